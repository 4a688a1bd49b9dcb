"""Runs that are interrupted and go on: bit for bit, or not at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from flwr.app import Message

from slora_flwr.client.residuals import Residuals
from slora_flwr.common.files import cache_folder
from slora_flwr.runs.checkpoint import read_checkpoint
from slora_flwr.runs.checkpoint_files import list_checkpoints
from slora_flwr.server.run import run
from tests.support.grids import RUN_IDS, Grid
from tests.support.own_data import NodesGrid, make_own_data_config, nodes_of
from tests.support.resuming import (
    InterruptionError,
    StoppingGrid,
    assert_same,
    go_on,
    resumed,
    stop,
)
from tests.support.runs import (
    INT8,
    LOSSLESS,
    SLORA,
    TOP,
    Config,
    elsewhere,
    events,
    ledger,
    start,
    summary,
)
from tests.support.tiny import CLASSES


@pytest.fixture
def config(config: Config) -> Config:
    return config | {"rounds": 4, "sparse.rounds": 2, "clients.per-round": 4}


CASES: dict[str, Config] = {
    "slora": SLORA,
    "per-round": SLORA | INT8 | LOSSLESS | {"sparse.schedule": "per-round"},
    "fedex-lora": {"method": "fedex-lora", "rounds": 3},
    "exact": SLORA | INT8 | {"lora.aggregator": "exact"},
    "exact-holdout": SLORA
    | INT8
    | {"lora.aggregator": "exact", "clients.holdout": 0.2, "server.average": "none"},
    "flexlora": {"method": "flexlora", "lora.ranks": "4, 2", "rounds": 3},
    "fedadam": SLORA
    | {"server.optimizer": "fedadam", "server.lr": 0.01, "lora.base": "w0"},
    "fedavgm": TOP | {"method": "alternate-lora", "server.optimizer": "fedavgm"},
    # Nothing is gained, so that it ends in round 4 of at most 5.
    "open": SLORA | {"sparse.rounds": 0, "rounds": 10, "sparse.lr": 1e-9},
    "coded": SLORA | TOP | LOSSLESS | {"upload.dtype": "int4"},
    "ffa": INT8
    | LOSSLESS
    | {"method": "ffa-lora", "lora.start": "orthonormal", "rounds": 3},
    "fft": TOP | LOSSLESS | {"method": "fft", "run.eval-every": 0, "rounds": 3},
    "causal": SLORA | INT8 | LOSSLESS | {"task": "causal-lm"},
    "causal-exact": SLORA | {"task": "causal-lm", "lora.aggregator": "exact"},
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_is_stopped_after_each_round_ends_as_if_it_were_not(
    config: Config, causal: Config, name: str
) -> None:
    config |= causal if "task" in CASES[name] else {}
    config |= CASES[name]
    first, *others = range(2, int(config["rounds"]) + 1)
    if name == "open":
        first, *others = 3, 5, 6
    whole = start(config, Grid(config, nodes=3))
    config = elsewhere(config)
    stop(config, first)
    for last in others:
        stop(resumed(config), last)
    directory = go_on(config)
    resumptions = [event["round"] for event in events(directory, "resumed")]
    assert resumptions == [last - 1 for last in (first, *others)]
    assert_same(directory, whole)
    if name == "open":
        phases = [event["phase"] for event in events(directory, "round")]
        assert phases == ["sparse"] * 4 + ["lora"] * 6


def test_a_run_that_has_ended_goes_on_to_the_same_end(config: Config) -> None:
    config |= SLORA
    whole = start(config, Grid(config))
    config = elsewhere(config)
    start(config, Grid(config))
    directory = Path(str(config["run.dir"]))
    shutil.rmtree(directory / "adapter")
    (directory / "summary.json").unlink()
    grid = Grid(config)
    start(resumed(config), grid)
    assert grid.asked == []
    assert_same(directory, whole)


def test_seconds_go_on(config: Config) -> None:
    directory = stop(config, 3)
    before = [event["seconds"] for event in events(directory, "round")]
    go_on(config)
    after = [event["seconds"] for event in events(directory, "round")]
    assert after[:2] == before
    assert after == sorted(after)
    assert events(directory, "resumed")[0]["seconds"] >= before[-1]
    assert summary(directory)["seconds"] >= after[-1]


def test_what_was_written_after_the_checkpoint_is_cut_off(config: Config) -> None:
    directory = stop(config, 3)
    assert len(events(directory, "stopped")) == 1
    with (directory / "events.jsonl").open("a") as file:
        file.write('{"event": "rou')
    with (directory / "ledger.csv").open("a") as file:
        file.write("3,lora,up,4")
    (directory / "checkpoints" / "last.safetensors.f00.part").write_bytes(b"half")
    go_on(config)
    kinds = [
        json.loads(line)["event"]
        for line in (directory / "events.jsonl").read_text().splitlines()
    ]
    assert kinds == ["round", "round", "resumed", "round", "round"]
    assert [row["round"] for row in ledger(directory)] == [*"11223344"]
    assert not list(directory.rglob("*.part"))


# Residuals


def test_residuals_are_kept_as_far_back_as_checkpoints() -> None:
    lineage = next(RUN_IDS)
    node_context = Grid({})._contexts[1]
    store = Residuals(node_context, lineage, 2, is_only_client=False)

    def kept_after(server_round: int, since: int) -> set[int]:
        store.keep(3, "", server_round, since, {"x": torch.ones(1)})
        return {n for n in range(20) if store.take(3, "", n)}

    for number, since in ((1, 0), (2, 1), (5, 2), (6, 5)):
        kept_after(number, since)
    # In round 9 a run may go back to the end of round 7: then 6 is the last one.
    assert kept_after(9, 6) == {6, 9}
    assert kept_after(10, 9) == {6, 9, 10}
    assert kept_after(11, 10) == {9, 10, 11}
    # Round 11 did not count, nor 13, nor 16: 10 is what all go on from.
    assert kept_after(13, 10) == {10, 13}
    assert kept_after(16, 10) == {10, 16}
    assert kept_after(19, 10) == {10, 19}


def test_a_repeated_round_starts_from_the_residual_before_it(config: Config) -> None:
    """Rounds whose update did not count leave none behind."""
    config |= {"upload.dtype": "int4", "clients.per-round": 6}
    first = StoppingGrid(config, 3)
    with pytest.raises(InterruptionError):
        start(config, first)
    lineage = first.run.run_id
    third = {
        path.parent.name for path in (cache_folder() / f"run-{lineage}").glob("*/3")
    }
    assert 0 < len(third) < 6
    grid = Grid(config, nodes=2)
    start(resumed(config), grid)
    assert {asked.lineage for asked in grid.asked} == {lineage}
    for asked in grid.asked:
        assert asked.residuals == [asked.server_round - 1] * len(asked.clients)


# Nodes' own data


def test_nodes_keep_their_numbers_and_labels(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    config = make_own_data_config(tmp_path, tiny_models["bert"])

    class Stopping(NodesGrid):
        def _answer(self, message: Message) -> Message:
            if message.metadata.group_id == "2":
                raise InterruptionError
            return super()._answer(message)

    with pytest.raises(InterruptionError):
        run(Stopping(config, nodes_of(tmp_path)), config, 1)
    directory = Path(str(config["run.dir"]))
    kept = read_checkpoint(list_checkpoints(directory)[-1]).facts["agreed"]
    assert kept["classes"] == CLASSES
    assert kept["clients"] == {"a": 0, "b": 1, "c": 2}
    # All but the first are there again.
    others = nodes_of(tmp_path)
    del others["a"]
    config |= {"clients.min-nodes": 2}
    run(NodesGrid(config, others), resumed(config), 2)
    told = [(e["name"], e["client"]) for e in events(directory, "node")]
    assert told == [("a", 0), ("b", 1), ("c", 2), ("b", 1), ("c", 2)]
    assert [e["cohort"] for e in events(directory, "round")] == [
        [0, 1, 2],
        *2 * [[1, 2]],
    ]
