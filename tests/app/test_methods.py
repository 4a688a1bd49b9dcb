"""Whole runs of every method: aggregators, controls, ranks, masks that change."""

import csv
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForSequenceClassification

from slora_flwr.adapters.export import load_adapter
from slora_flwr.adapters.masks import make_mask
from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.backbone.load import Backbone, load_backbone
from slora_flwr.client.process import make_process
from slora_flwr.common.tensors import State
from slora_flwr.config import Value, parse
from slora_flwr.config.methods import METHODS, find_adapter
from slora_flwr.config.schedule import make_schedule
from slora_flwr.planning.version_bytes import VersionBytes
from slora_flwr.server.run import run
from slora_flwr.training import attached_model
from slora_flwr.training.trainer import Trainer
from slora_flwr.wire.base_codec import BaseCodec
from slora_flwr.wire.messages import Instruction, Report
from slora_flwr.wire.packing import pack, unpack
from slora_flwr.wire.state_channel import read_base
from tests.support.grids import RecordingGrid
from tests.support.runs import (
    HEAD_VALUES,
    HIDDEN,
    INNER,
    INT8,
    LAYERS,
    LORA_VALUES,
    RANK,
    SPARSE_VALUES,
    Config,
    differ,
    elsewhere,
    events,
    facts,
    final,
    ledger,
    make_config,
    payloads,
    start,
    summary,
)
from tests.support.tiny import CLASSES, load_tiny, logits

CLIENTS = 6
# By hand: all B are 32 or 48 by rank, all A rank by 32 or 48.
B_VALUES = LAYERS * RANK * (4 * HIDDEN + INNER + HIDDEN)
A_VALUES = LORA_VALUES - B_VALUES
TARGET_VALUES = LAYERS * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * INNER)

RUNS: dict[str, Config] = {
    **{method: {"method": method} for method in METHODS},
    "slora-ffa": {"method": "slora", "lora.aggregator": "ffa"},
    "slora-ffa-w0": {"method": "slora", "lora.aggregator": "ffa", "lora.base": "w0"},
    "slora-ffa-warm": {
        "method": "slora",
        "lora.aggregator": "ffa",
        "lora.base": "warm-start",
    },
    "slora-alternate": {"method": "slora", "lora.aggregator": "alternate"},
    "slora-exact": {"method": "slora", "lora.aggregator": "exact"},
    "slora-flexlora": {"method": "slora", "lora.aggregator": "flexlora"},
    "per-round": {"method": "sft", "sparse.schedule": "per-round"},
    "per-round-slora": {
        "method": "slora",
        "sparse.schedule": "per-round",
        "sparse.rounds": 2,
    },
    "per-round-rows": {
        "method": "sft",
        "sparse.schedule": "per-round",
        "sparse.mask": "rows",
    },
    "budget": {"method": "sft", "sparse.budget": "erdos-renyi"},
    "federa": {"method": "lora", "lora.start": "federa"},
    "federa-ffa": {"method": "ffa-lora", "lora.start": "federa"},
    "orthonormal": {"method": "lora", "lora.start": "orthonormal"},
    "orthonormal-ffa": {"method": "ffa-lora", "lora.start": "orthonormal"},
    "slora-ranks": {"method": "slora", "lora.base": "w0", "lora.ranks": "1,2,4"},
    "ranks": {"method": "lora", "lora.ranks": "1,2,4"},
    "ranks-flexlora": {"method": "flexlora", "lora.ranks": "1,2,4"},
    "root-rank": {"method": "lora", "lora.scaling": "root-rank"},
    "slora-bf16": {"method": "slora", "model.dtype": "bfloat16"},
    "federa-bf16": {
        "method": "lora",
        "lora.start": "federa",
        "model.dtype": "bfloat16",
    },
}
CAUSAL = {"task": "causal-lm"}
RUNS |= {
    f"causal {method}": {"method": method, **CAUSAL}
    # The other methods' states are parts of these.
    for method in ("slora", "fft", "alternate-lora", "fedex-lora", "flexlora")
}
RUNS |= {
    "causal coded": INT8 | {"method": "slora", **CAUSAL},
    "causal bf16": {"method": "slora", "model.dtype": "bfloat16", **CAUSAL},
    "causal tokens": {"method": "slora", "clients.weight": "tokens", **CAUSAL},
}


# Makes the run of a name by one node, if no test has, and gives its config.
Ran = Callable[[str], Config]


@pytest.fixture(scope="module")
def ran(
    corpus: Path,
    tiny_models: dict[str, Path],
    causal: Config,
    tmp_path_factory: pytest.TempPathFactory,
) -> Ran:
    @functools.cache
    def make(name: str) -> Config:
        directory = tmp_path_factory.mktemp("ran") / "run"
        config = make_config(corpus, tiny_models["bert"], directory)
        # Not all clients in each round, so that some miss what changed.
        config |= causal if "task" in RUNS[name] else {}
        config |= {**RUNS[name], "clients.per-round": 4, "rounds": 4}
        start(config, RecordingGrid(config))
        return config

    return make


@pytest.mark.parametrize("name", RUNS)
def test_one_node_is_many_nodes(ran: Ran, name: str) -> None:
    config = ran(name)
    one = Path(str(config["run.dir"]))
    many = start(elsewhere(config), RecordingGrid(elsewhere(config), nodes=4))
    assert not differ(final(one), final(many))
    assert payloads(one) == payloads(many)
    assert summary(one)["loss"] == summary(many)["loss"]
    moved = (one / "checkpoints" / "base.safetensors").exists()
    assert moved == (many / "checkpoints" / "base.safetensors").exists()
    assert not moved or not differ(final(one, "base"), final(many, "base"))


SHARED = [
    ("slora", False),
    ("slora", True),
    ("slora-exact", True),
    ("slora-bf16", False),
    ("per-round-slora", False),
    ("per-round-slora", True),
    ("fft", True),
    ("houlsby", False),
]


@pytest.mark.parametrize(("name", "lossy"), SHARED)
def test_nodes_that_share_the_servers_model_change_nothing(
    config: Config, monkeypatch: pytest.MonkeyPatch, name: str, lossy: bool
) -> None:
    """Two nodes with a backbone of their own, and two that use the server's."""
    loaded: list[Backbone] = []

    def load(*given: Any) -> Backbone:
        loaded.append(load_backbone(*given))
        return loaded[-1]

    monkeypatch.setattr(attached_model, "load_backbone", load)
    config |= {**RUNS[name], **(INT8 if lossy else {}), "rounds": 4}
    config |= {"clients.per-round": 4}
    directories = []
    for share in (False, True):
        given = elsewhere(config, **{"run.dir": f"{config['run.dir']}-{share}"})
        grid = RecordingGrid(given, nodes=2)
        make_process.cache_clear()
        loaded.clear()
        run(grid, given, 1, share=grid.share if share else None)
        assert len(loaded) == (1 if share else 2)
        directories.append(Path(str(given["run.dir"])))
    apart, shared = directories
    for state in (apart / "checkpoints").glob("*.safetensors"):
        assert not differ(final(apart, state.stem), final(shared, state.stem))
    assert payloads(apart) == payloads(shared)
    assert ledger(apart) == ledger(shared)
    assert summary(apart)["loss"] == summary(shared)["loss"]


LOW_RANK = [
    name
    for name, changes in RUNS.items()
    if make_schedule(parse(changes))[-1].adapter == "lora" and "task" not in changes
]


@pytest.mark.parametrize("name", LOW_RANK)
def test_stock_peft_computes_what_the_run_evaluated(ran: Ran, name: str) -> None:
    config = ran(name)
    directory = Path(str(config["run.dir"]))
    folder = directory / "adapter"
    dtype = str(config.get("model.dtype", "float32"))
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        str(config["model.name"]), num_labels=len(CLASSES), dtype=dtype
    )
    model = load_adapter(model, folder)
    test = Trainer(parse(config)).data.tokenised.test
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        found = logits(model, test)
    loss = F.cross_entropy(found, torch.from_numpy(test.labels))
    assert float(loss) == pytest.approx(summary(directory)["loss"], abs=1e-4)


def round_bytes(directory: Path) -> list[tuple[int, int]]:
    """Bytes of each round, down and up."""
    rows = payloads(directory)
    return [(d[4], u[4]) for d, u in zip(rows[::2], rows[1::2], strict=True)]


def test_bytes_of_frozen_factors(config: Config) -> None:
    config |= {"method": "ffa-lora"}
    sent = 4 * CLIENTS * (B_VALUES + HEAD_VALUES)  # A follows from the seed
    assert round_bytes(start(config, RecordingGrid(config))) == 3 * [(sent, sent)]


def test_bytes_of_frozen_factors_that_were_primed(config: Config) -> None:
    config |= RUNS["slora-ffa-w0"] | {"download.base-dtype": "float32"}
    sent = B_VALUES + HEAD_VALUES
    _, second, third = round_bytes(start(config, RecordingGrid(config)))
    # A frame of 8 bytes around each of the base's two parts.
    assert second == (CLIENTS * (4 * (sent + A_VALUES) + 16), 4 * CLIENTS * sent)
    assert third == (4 * CLIENTS * sent, 4 * CLIENTS * sent)


def test_bytes_of_alternating_factors(config: Config) -> None:
    config |= {"method": "alternate-lora"}
    down = 4 * CLIENTS * (LORA_VALUES + HEAD_VALUES)
    b, a = (4 * CLIENTS * (n + HEAD_VALUES) for n in (B_VALUES, A_VALUES))
    found = round_bytes(start(config, RecordingGrid(config)))
    assert found == [(down, b), (down, a), (down, b)]


def test_bytes_of_unequal_ranks(config: Config) -> None:
    config |= {"method": "flexlora", "lora.ranks": "1,2,4"}
    slices = 2 * (1 + 2 + 4)  # of six clients
    sent = 4 * (slices * LORA_VALUES // RANK + CLIENTS * HEAD_VALUES)
    grid = RecordingGrid(config, nodes=CLIENTS)
    assert round_bytes(start(config, grid)) == 3 * [(sent, sent)]
    # With a client each, nodes are sent that and no more, and so is the server.
    assert sum(len(i.state.data) for i in grid.asked) == 3 * sent
    assert sum(len(report.update.data) for report in grid.reports) == 3 * sent


@pytest.mark.parametrize("method", ["lora", "flexlora"])
def test_slices_of_ranks_that_a_client_lacks_are_refused(
    config: Config, method: str
) -> None:
    """A reply of the full rank, from the clients of rank 1 at node 2."""

    def widen(report: Report) -> None:
        values = torch.ones(LORA_VALUES + HEAD_VALUES)
        report.update = pack({"all": values})

    config |= {"method": method, "lora.ranks": "1", "rounds": 1}
    grid = RecordingGrid(config, nodes=CLIENTS, tampers={1: widen})
    directory = start(config, grid)
    [failure] = events(directory, "failure")
    assert "with shape" in failure["reason"]
    assert float(final(directory)["classifier.bias"].abs().max()) < 0.5


def test_a_clients_id_is_a_whole_number(config: Config) -> None:
    def as_floats(report: Report) -> None:
        report.clients = [float(client) for client in report.clients]  # type: ignore[misc]

    config |= {"method": "lora", "lora.ranks": "1,2", "rounds": 1}
    grid = RecordingGrid(config, nodes=CLIENTS, tampers={1: as_floats})
    [failure] = events(start(config, grid), "failure")
    assert "not client ids" in failure["reason"]


def test_bytes_of_masks_drawn_anew(config: Config) -> None:
    """Down goes what the last round changed, once; up the round's own values."""
    config |= RUNS["per-round"]
    values, head = 4 * CLIENTS * SPARSE_VALUES, 4 * CLIENTS * HEAD_VALUES
    found = round_bytes(start(config, RecordingGrid(config)))
    up = values + head
    assert found == [(head, up), (values + head, up), (values + head, up)]


def test_a_client_gets_what_it_missed(config: Config) -> None:
    config |= {**RUNS["per-round"], "clients.per-round": 1, "rounds": 30}
    grid = RecordingGrid(config)
    directory = start(config, grid)
    seen: dict[int, int] = {}
    for number, (down, _) in enumerate(round_bytes(directory)):
        [client] = grid.asked[number].clients
        missed = (number - seen.get(client, 0)) * SPARSE_VALUES
        assert down == 4 * (HEAD_VALUES + min(missed, TARGET_VALUES))
        seen[client] = number


def test_the_matrices_go_where_they_are_cheaper() -> None:
    """A start of 30 bytes, matrices of 100, and changes of 40 each."""
    held = VersionBytes(30, 100)
    assert held.bytes_due(1) == 30
    assert held.bytes_due(1) == 0
    held.changes += [40, 40]
    assert held.bytes_due(1) == 80
    assert held.bytes_due(2) == 100  # for 30 + 80
    held.changes.append(40)
    assert [held.bytes_due(client) for client in (1, 2, 3)] == [40, 40, 100]
    assert VersionBytes(130, 100).bytes_due(1) == 130  # a start alone is no change


def base_of(directory: Path) -> State:
    return final(directory, "base")


def weights_of(config: Config) -> State:
    backbone = load_tiny(Path(str(config["model.name"])))
    return {n: m.weight.detach().clone() for n, m in backbone.targets.items()}


def test_the_base_of_exact_holds_what_the_means_lack(config: Config) -> None:
    """In weight space: W + s·B·A after a round is W + s·mean(B_i·A_i)."""
    config |= {"method": "fedex-lora", "rounds": 1, "clients.partitioner": "dirichlet"}
    grid = RecordingGrid(config, nodes=6)  # a client each
    directory = start(config, grid)
    [asked] = {i.fingerprint for i in grid.asked}
    assert asked
    scaling = 16 / RANK
    base, state, before = base_of(directory), final(directory), weights_of(config)
    adapter = find_adapter("lora").from_config(parse(config))
    adapter.attach(load_tiny(Path(str(config["model.name"]))))
    shapes = adapter.shapes()
    sent = unpack(grid.asked[0].state, shapes)
    total = sum(sum(report.examples) for report in grid.reports)
    for name in before:
        wanted = before[name].double()
        for report in grid.reports:
            update = unpack(report.update, shapes)
            b = sent[f"{name}.lora_B"].double() + update[f"{name}.lora_B"].double()
            a = sent[f"{name}.lora_A"].double() + update[f"{name}.lora_A"].double()
            wanted += sum(report.examples) / total * scaling * (b @ a)
        product = state[f"{name}.lora_B"].double() @ state[f"{name}.lora_A"].double()
        found = base[name].double() + scaling * product
        apart = before[name].double() + scaling * product
        largest = float(wanted.abs().max())
        assert float((found - wanted).abs().max()) < 1e-6 * largest
        assert float((apart - wanted).abs().max()) > 1e-5 * largest


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "sft", "sparse.schedule": "per-round"},
        # Of two clients, so that the changes are smaller than the matrices.
        {"method": "fedex-lora", "clients.per-round": 2},
    ],
)
def test_a_node_that_lost_a_moved_base_gets_it_anew(
    config: Config, changes: Config
) -> None:
    """A worker that begins in round 3 ends as one that was there from the first."""

    class Forgetful(RecordingGrid):
        def before(self, asked: Instruction) -> None:
            if asked.server_round == 3 and asked.base_delta.version == 1:
                make_process.cache_clear()

    config |= {**changes, "rounds": 4}
    expected = final(start(config, RecordingGrid(config)))
    grid = Forgetful(elsewhere(config))
    directory = start(elsewhere(config), grid)
    assert [i.server_round for i in grid.asked] == [1, 2, 3, 3, 4]
    assert [len(i.base_delta.changes) for i in grid.asked] == [0, 1, 1, 2, 1]
    assert not events(directory, "failure")
    assert not differ(final(directory), expected)


def test_frozen_factors_stay(config: Config) -> None:
    config |= {"method": "ffa-lora"}
    directory = start(config, RecordingGrid(config))
    assert not any(name.endswith("lora_A") for name in final(directory))
    backbone = load_tiny(Path(str(config["model.name"])))
    adapter = find_adapter("lora").from_config(parse(config))
    adapter.attach(backbone)
    written = load_file(directory / "adapter" / "adapter_model.safetensors")
    for name in backbone.targets:
        a = backbone.model.get_submodule(name).lora_A["default"].weight
        assert torch.equal(written[f"base_model.model.{name}.lora_A.weight"], a)


def test_a_mask_of_its_own_for_each_round(config: Config) -> None:
    """The trained weights differ from W_0 under the union of the rounds' masks."""
    # With one step of Adam, clients' changes of the same size could cancel.
    config |= RUNS["per-round"] | {"train.epochs": 2}
    base, before = base_of(start(config, RecordingGrid(config))), weights_of(config)
    for name, weight in before.items():
        shape = (weight.shape[0], weight.shape[1])
        masks = [make_mask(0, name, shape, 0.05, server_round=t) for t in (1, 2, 3)]
        union = np.unique(np.concatenate(masks))
        assert len(union) > 1.5 * len(masks[0])
        changed = np.flatnonzero((base[name] != weight).reshape(-1).numpy())
        assert set(changed) <= set(union)
        assert len(changed) > 0.9 * len(union)


def test_a_redrawn_phase_is_handed_over_whole(config: Config) -> None:
    """Base `residual` after the handoff: its weights are what rounds learned, averaged.

    Its factors are those that the low-rank phase starts from.
    """
    config |= {
        **RUNS["per-round-slora"],
        "rounds": 4,
        "sparse.rounds": 3,
        "download.base-dtype": "float32",
    }
    sparse = elsewhere(config, method="sft", rounds=3)
    learned = final(start(sparse, RecordingGrid(sparse)), "averaged-base")
    grid = RecordingGrid(config)
    start(config, grid)
    [first] = [i for i in grid.asked if i.server_round == 4]
    settings = parse(config)
    backbone = load_tiny(Path(str(config["model.name"])))
    adapter = find_adapter("sparse").from_config(settings)
    positions = adapter.masks(backbone, 3)
    assert first.base_delta.start is not None
    layout = BaseWeights.shapes(backbone, positions, RANK)
    codec = BaseCodec.of(settings.download)
    sent = bytes(first.base_delta.start.data)
    patch = read_base(sent, layout, positions, 16 / RANK, codec, {})
    patch.apply(backbone)
    lora = find_adapter("lora").from_config(settings)
    lora.attach(backbone)
    state = unpack(first.state, lora.shapes())
    for name, module in backbone.targets.items():
        assert state[f"{name}.lora_B"].any()
        assert torch.equal(module.weight.cpu(), learned[name])
    assert not differ(patch.factors(), state)


def test_an_open_phase_ends_by_its_rule(config: Config) -> None:
    config |= {"method": "slora", "sparse.rounds": 0, "rounds": 12}
    directory = start(config, RecordingGrid(config))
    rounds = events(directory, "round")
    sparse = [e for e in rounds if e["phase"] == "sparse"]
    phases = summary(directory)["phases"]
    assert phases["sparse"]["rounds"] == len(sparse) <= 6
    assert phases["lora"]["rounds"] == 12 - len(sparse)
    assert len(rounds) == 12
    assert all(0 < e["kept_energy"] <= 1 for e in sparse)
    [handoff] = events(directory, "handoff")
    energies = handoff["energies"].values()
    kept = math.fsum(energies) / len(energies)
    assert sparse[-1]["kept_energy"] == pytest.approx(kept, rel=1e-6)
    assert all("accuracy" in e for e in sparse)
    with (directory / "ledger.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            assert row["planned_payload_bytes"] == row["payload_bytes"]


def test_the_best_state_has_its_base(config: Config) -> None:
    config |= {"method": "fedex-lora", "rounds": 4}
    directory = start(config, RecordingGrid(config))
    bases = {"last": "base", "averaged": "averaged-base", "best": "best-base"}
    for name, base in bases.items():
        assert facts(directory, name)["base"] == facts(directory, base)["digest"]


def test_a_base_that_no_longer_holds_is_gone(config: Config) -> None:
    config |= {**RUNS["per-round-slora"], "lora.base": "w0"}
    directory = start(config, RecordingGrid(config))
    assert not (directory / "checkpoints" / "base.safetensors").exists()
    assert facts(directory, "last")["base"] == ""


def test_federa_begins_with_the_checkpoints_function(config: Config) -> None:
    """Without training (lr of 1e-12) the run evaluates as the untouched model does."""
    losses = []
    for begin in ("federa", "peft"):
        config = elsewhere(config, rounds=1, **{"lora.start": begin, "train.lr": 1e-12})
        losses.append(summary(start(config, RecordingGrid(config)))["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_head_first_keeps_its_head(config: Config) -> None:
    config |= {"method": "head-lora", "sparse.rounds": 2}
    grid = RecordingGrid(config)
    directory = start(config, grid)
    only = elsewhere(config, method="head", rounds=2)
    head = final(start(only, RecordingGrid(only)), "averaged")
    [third] = [i for i in grid.asked if i.server_round == 3]
    lora = find_adapter("lora").from_config(parse(config))
    lora.attach(load_tiny(Path(str(config["model.name"]))))
    state = unpack(third.state, lora.shapes())
    assert all(torch.equal(state[name], tensor) for name, tensor in head.items())
    assert list(summary(directory)["phases"]) == ["head", "lora"]
    assert len(head["classifier.bias"]) == len(CLASSES)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"method": "ffa-lora", "lora.aggregator": "exact"}, "the one of ffa-lora"),
        (
            {"method": "fedex-lora", "server.optimizer": "fedadam"},
            "aggregator is exact",
        ),
        ({"method": "flexlora", "server.lr": 0.5}, "1.0, since the aggregator is flex"),
        ({"method": "ffa-lora", "lora.ranks": "1,2"}, "empty, since the aggregator is"),
        ({"method": "fedex-lora", "model.dtype": "bfloat16"}, "exact adds to the weig"),
        (
            {"sparse.schedule": "per-round", "model.dtype": "bfloat16"},
            "per-round writes to the weights",
        ),
        ({"method": "head-lora", "sparse.rounds": 0}, "at least 1 for head-lora"),
        ({"lora.start": "federa"}, "peft for slora"),
        ({"lora.ranks": "1,2"}, "empty, since lora.base is residual"),
        (
            {"method": "lora", "lora.start": "federa", "lora.ranks": "1"},
            "empty, since lora.start is federa",
        ),
        (
            {"sparse.schedule": "per-round", "server.optimizer": "fedavgm"},
            "none, since sparse.schedule is per-round",
        ),
    ],
)
def test_what_does_not_go_together(values: dict[str, Value], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse(values)


@pytest.mark.parametrize("name", RUNS)
def test_the_ledger_is_as_planned(ran: Ran, name: str) -> None:
    """Formulas from the config against the shapes of what was sent."""
    with (Path(str(ran(name)["run.dir"])) / "ledger.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    for row in rows:
        planned, sent = int(row["planned_payload_bytes"]), int(row["payload_bytes"])
        if "exact" in name or "fedex" in name:  # moves are of rank 4 · 4 at most
            assert sent <= planned
        else:
            assert sent == planned
