"""The plan of a run: bytes of rounds, memory of a client, the command."""

from pathlib import Path
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner, Result

from slora_flwr.backbone.load import Backbone
from slora_flwr.cli import app
from slora_flwr.config import parse
from slora_flwr.config.schedule import make_schedule
from slora_flwr.planning.assumptions import Assumptions
from slora_flwr.planning.memory import Memory, plan_memory
from slora_flwr.planning.rounds import PlannedRound, plan_rounds
from tests.support.runs import (
    HEAD_VALUES,
    LAYERS,
    LORA_VALUES,
    RANK,
    SPARSE_VALUES,
    Config,
)
from tests.support.tiny import CLASSES, load_tiny

CLIENTS = list(range(6))
# Two lengths, values, and the factors in int8: a header, and a scale for each 128.
BASE = 2 * 8 + 4 * SPARSE_VALUES + 13 + LORA_VALUES + 4 * -(-LORA_VALUES // 128)


@pytest.fixture
def bert(tiny_models: dict[str, Path]) -> Backbone:
    return load_tiny(tiny_models["bert"])


def test_slora_by_hand(config: Config, bert: Backbone) -> None:
    """A base goes down once: values under the mask and both factors."""
    config |= {"method": "slora"}
    sparse = 4 * 6 * (SPARSE_VALUES + HEAD_VALUES)
    lora = 4 * 6 * (LORA_VALUES + HEAD_VALUES)
    base = 6 * BASE
    assert plan_rounds(parse(config), bert, CLIENTS) == [
        PlannedRound(1, 0, sparse, sparse),
        PlannedRound(2, 1, lora + base, lora),
        PlannedRound(3, 1, lora, lora),
    ]


def test_a_client_gets_the_base_when_it_is_first_drawn(
    config: Config, bert: Backbone
) -> None:
    config |= {"method": "slora", "rounds": 40, "clients.per-round": 2}
    rounds = plan_rounds(parse(config), bert, CLIENTS)
    lora = 4 * 2 * (LORA_VALUES + HEAD_VALUES)
    extra = sum(planned.down - lora for planned in rounds if planned.phase == 1)
    assert extra == 6 * BASE


def memory(config: Config, bert: Backbone, **changes: Any) -> Memory:
    settings = parse(config | changes)
    return plan_memory(make_schedule(settings)[0], settings, bert)


def test_memory_by_hand(config: Config, bert: Backbone) -> None:
    """Gradients and AdamW's two moments, and values that the backbone lacks."""
    head, weights = HEAD_VALUES, 4 * bert.size
    full = memory(config, bert, method="fft")
    lora = memory(config, bert, method="lora")
    sparse = memory(config, bert, method="sft")
    assert (full.weights, full.trained) == (weights, 0)
    assert (full.moments, full.state) == (2 * weights, weights)
    assert (full.gradients, full.added, full.kept) == (weights, 0, 0)
    assert lora.trained == 4 * LORA_VALUES
    assert lora.moments == 2 * 4 * (LORA_VALUES + head) == 2 * lora.state
    assert sparse.trained == 4 * SPARSE_VALUES
    plain = memory(config, bert, method="fft", **{"train.optimizer": "sgd"})
    assert plain.moments == 0
    lasting = full.weights + full.aside + full.trained + full.moments + full.state
    assert full.total == lasting + max(full.activations, full.gradients)
    # Each of two parts has half of the activations, and the first leaves gradients.
    parts = memory(config, bert, method="fft", **{"train.accumulate": 2})
    largest = 4 * 120 * 32  # the embedding's
    assert (parts.kept, parts.added) == (weights, largest)
    assert parts.total == lasting + weights + max(parts.activations, largest)
    assert 0.5 < parts.activations / full.activations < 0.52  # with a mask's table
    assert full.outputs == 0  # a classifier's are few
    assert (full.aside, lora.aside) == (weights, 4 * head)  # to give W_0 back
    # What restores the values, their positions, and a CSR pattern of them.
    rows = LAYERS * (4 * 32 + 48 + 32 + 6)
    assert sparse.aside == (4 + 8 + 12) * SPARSE_VALUES + 8 * rows + 4 * head
    second = make_schedule(parse(config | {"method": "slora"}))[1]
    slora = plan_memory(second, parse(config | {"method": "slora"}), bert)
    # Values, their int64 positions and what they replace; A and B of the start.
    base = (4 + 8 + 4) * SPARSE_VALUES + 4 * LORA_VALUES
    assert slora.aside == base + 4 * head
    exact = memory(config, bert, method="fedex-lora")
    assert exact.aside == 4 * LAYERS * (4 * 32 * 32 + 2 * 32 * 48) + 4 * head


def test_columns_keep_a_slice_of_the_activations(
    config: Config, bert: Backbone
) -> None:
    """Each layer's inputs of 4 x 32 and 32 + 48 features; 2 columns of each at 5%."""
    whole = memory(config, bert, method="sft")
    slices = memory(config, bert, method="sft", **{"sparse.mask": "columns"})
    tokens = 32 * 12
    # Query, key and value share an input, and attention's output is one more.
    inputs = LAYERS * 4 * tokens * (32 + 32 + 32 + 48)
    kept = LAYERS * 4 * tokens * 6 * 2
    assert whole.activations - slices.activations <= inputs
    assert whole.activations - slices.activations > inputs / 4 - kept
    assert memory(config, bert, method="fft").activations >= whole.activations


def test_nothing_stays_attached(config: Config, bert: Backbone) -> None:
    before = bert.digest
    memory(config, bert, method="fft")
    memory(config, bert, method="fedex-lora")
    del bert.digest
    assert bert.digest == before
    assert not any(p.requires_grad for p in bert.model.parameters())


def test_the_command(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(config | {"method": "slora"}))
    found = CliRunner().invoke(app, ["plan", "-c", str(path)], env={"COLUMNS": "80"})
    assert found.exit_code == 0, found.output
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in found.output.splitlines()
        if line.startswith("│")
    ]
    phases = ["sparse phase", "lora phase", "fft", "lora"]
    assert [row[0] for row in rows] == 3 * phases
    trains, sends, takes = rows[:4], rows[4:8], rows[8:]
    trained = LORA_VALUES + HEAD_VALUES
    assert trains[1][2] == f"{trained:,}"
    assert sends[3][2] == f"{4 * trained / 1e3:,.1f}"
    assert sends[3][4] == f"{4 * 3 * 6 * trained / 1e6:,.2f}"
    assert (RANK, len(CLASSES)) == (4, 3)
    # Down and up, in bits, over links of 10, 100 and 1000 Mbit/s.
    [bits] = {2 * 8 * 4 * trained}
    assert [float(x) for x in takes[3][1:]] == pytest.approx(
        [bits / 1e7, bits / 1e8, bits / 1e9], rel=0.05
    )


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_bfloat16_can_be_planned(
    config: Config, tmp_path: Path, precision: str
) -> None:
    path = tmp_path / "run.toml"
    changes = {"model.dtype": "bfloat16", "train.precision": precision}
    path.write_text(tomli_w.dumps(config | changes))
    found = CliRunner().invoke(app, ["plan", "-c", str(path)], env={"COLUMNS": "80"})
    assert found.exit_code == 0, found.output
    assert "fft" not in found.output  # which has no bfloat16


def test_a_plan_for_nodes_data_needs_labels(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    changes = {"data.name": "node", "clients.count": 0, "clients.holdout": 0.2}
    path.write_text(tomli_w.dumps(config | changes))
    found = CliRunner().invoke(app, ["plan", "-c", str(path)])
    assert found.exit_code == 2
    assert "data.labels is ''" in found.output
    assert "or --labels with their assumed number" in found.output
    path.write_text(tomli_w.dumps(config | changes | {"data.labels": "a,b,c"}))
    found = CliRunner().invoke(app, ["plan", "-c", str(path)], env={"COLUMNS": "80"})
    assert f"{LORA_VALUES + HEAD_VALUES:,}" in found.output


NODES: Config = {"data.name": "node", "clients.count": 0, "data.labels": "odd,even"}


@pytest.mark.parametrize(
    "changes",
    [
        {"clients.count": 1000},
        {"clients.min-examples": 100},
        {"clients.partitioner": "pathological", "clients.classes": 9},
        {"clients.holdout": 0.99, "clients.count": 60},
        {**NODES, "data.test": "/absent.csv"},
        {**NODES, "data.test": "corpus"},
        {"run.target": 2.0},
        {"data.response": "text"},
        {"task": "causal-lm", "run.target": 0.5},
        {"task": "causal-lm", "run.choices": "/absent.jsonl"},
    ],
)
def test_what_a_run_refuses_a_plan_refuses(
    config: Config, causal: Config, corpus: Path, tmp_path: Path, changes: Config
) -> None:
    config |= (causal if "task" in changes else {}) | changes
    if config.get("data.test") == "corpus":
        config["data.test"] = str(corpus)  # whose labels are others
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(config))
    refused = CliRunner().invoke(app, ["run", "--engine", "inline", "-c", str(path)])
    assert (refused.exit_code, refused.stderr[:7]) == (2, "Error: "), refused.output
    planned = CliRunner().invoke(app, ["plan", "-c", str(path)])
    assert (planned.exit_code, planned.stdout) == (2, "")
    assert planned.stderr.splitlines()[-1] == refused.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, ""),
        ({"clients.count": 0}, "Not checked: whether the data suffice for all nodes."),
        (
            {**NODES, "clients.holdout": 0.5},
            "Not checked: what only nodes have, such as enough examples.",
        ),
    ],
)
def test_a_plan_tells_what_it_cannot_check(
    config: Config, tmp_path: Path, changes: Config, told: str
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(config | changes))
    found = CliRunner().invoke(app, ["plan", "-c", str(path)], env={"COLUMNS": "80"})
    assert found.exit_code == 0, found.output
    last = found.output.splitlines()[-1]
    assert last == told if told else "Not checked" not in found.output


OWN: Config = {"data.name": "node", "clients.count": 0, "clients.holdout": 0.2}


def plan_own(config: Config, tmp_path: Path, *options: str) -> Result:
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(config | OWN))
    arguments = ["plan", "-c", str(path), *options]
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})


def test_a_plan_assumes_labels_and_sizes_of_nodes_data(
    config: Config, bert: Backbone, tmp_path: Path
) -> None:
    config |= {"method": "slora", "rounds": 9, "clients.per-round": 2}
    config |= {"train.batch-size": 4}
    few = plan_own(config, tmp_path, "--labels", "3")
    assert few.exit_code == 0, few.output
    assert "Assumed: 3 labels.\n" in few.output
    # As many nodes as train in a round: each gets the base once.
    lora = LORA_VALUES + HEAD_VALUES
    assert f"{(4 * 2 * 8 * lora + 2 * BASE) / 1e6:,.2f}" in few.output
    sizes = "--nodes", "5", "--examples", "11"
    many = plan_own(config, tmp_path, "--labels", "3", *sizes)
    # Nine of eleven train, in batches of four.
    told = "Assumed: 3 labels, 5 nodes, 11 examples of each node. "
    assert f"{told}A client's steps in a round: sparse 3, lora 3.\n" in many.output
    planned = plan_rounds(parse(config | OWN), bert, list(range(5)))
    down = sum(done.down for done in planned if done.phase == 1)
    assert down > 4 * 2 * 8 * lora + 2 * BASE
    assert f"{down / 1e6:,.2f}" in many.output


def test_nodes_with_few_examples_need_less_memory(
    config: Config, bert: Backbone
) -> None:
    settings = parse(config | OWN | {"method": "lora", "lora.batch-size": 8})
    few = Assumptions(examples=4).in_batches(settings)
    assert (few.train.batch_size, few.lora.batch_size) == (3, 3)
    # 24 in three batches of eight, 25 in four of seven at most.
    for examples, largest in ((30, 8), (31, 7)):
        found = Assumptions(examples=examples).in_batches(settings)
        assert found.lora.batch_size == largest
    [phase] = make_schedule(settings)
    [small] = make_schedule(few)
    full = plan_memory(phase, settings, bert).activations
    assert plan_memory(small, few, bert).activations < full / 2


@pytest.mark.parametrize(
    ("changes", "options", "told"),
    [
        (OWN, ["--labels", "3", "--nodes", "2"], "--nodes is 2; allowed: at least"),
        (OWN | {"data.labels": "a,b"}, ["--labels", "3"], "--labels is 3; allowed: 2,"),
        ({}, ["--examples", "9"], "--examples is 9; allowed: none, since data.name"),
    ],
)
def test_what_contradicts_the_config_is_not_assumed(
    config: Config, tmp_path: Path, changes: Config, options: list[str], told: str
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(config | changes))
    found = CliRunner().invoke(app, ["plan", "-c", str(path), *options])
    assert found.exit_code == 2
    assert told in found.output


def test_a_bad_config_is_refused() -> None:
    found = CliRunner().invoke(app, ["plan", "-c", "lora.rank=0"])
    assert found.exit_code == 2
    assert "lora.rank is 0; allowed: a number of at least 1" in found.output
