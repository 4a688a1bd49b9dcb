"""Updates and sums that are finite and would spoil a state, or end a run."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from slora_flwr.common.tensors import State
from slora_flwr.config import ConfigError
from slora_flwr.server.run import run
from slora_flwr.server.strategy import TooFewRepliesError
from slora_flwr.tasks.classification import ClassifierEvaluation
from slora_flwr.training.trainer import Trainer
from slora_flwr.wire.messages import Report
from tests.support.grids import RecordingGrid, Tamper, put, values
from tests.support.runs import Config, differ, elsewhere, events, facts, final

PRIVATE: Config = {
    "clients.per-round": 6,
    "clients.min-replies": 1,
    "privacy.clip-norm": 0.5,
    "privacy.noise-multiplier": 0.05,
    "privacy.delta": 0.01,
}


def start(config: Config, grid: RecordingGrid) -> Path:
    run(grid, config, 1, np.random.default_rng(0))
    return Path(str(config["run.dir"]))


def filled(value: float) -> Tamper:
    """Return what fills a node's update or sums with a value."""

    def tamper(report: Report) -> None:
        put(report, values(report).clone().fill_(value))

    return tamper


@pytest.mark.parametrize("power", [62, 50])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_beyond_the_bound_of_privacy_are_their_nodes_failure(
    config: Config, power: int, sign: int
) -> None:
    config |= PRIVATE
    grid = RecordingGrid(config, nodes=2, tampers={2: filled(sign * 2**power)})
    directory = start(config, grid)
    [failure] = events(directory, "failure")
    assert (failure["round"], failure["node"]) == (2, 2)
    assert "3 times the bound of 0.5 that privacy sets" in failure["reason"]
    assert [event["replied"] for event in events(directory, "round")] == [6, 3, 6]
    assert all(float(t.abs().max()) < 10 for t in final(directory).values())


@pytest.mark.parametrize("nodes", [6, 3], ids=["updates", "sums"])
@pytest.mark.parametrize("number", [1, 2])
def test_an_update_far_beyond_the_others_is_its_nodes_failure(
    config: Config, nodes: int, number: int
) -> None:
    scale = {6: 1e5, 3: 1e5 * 2**30}[nodes]
    grid = RecordingGrid(config, nodes, {number: filled(scale)})
    directory = start(config, grid)
    failures = events(directory, "failure")
    # Before the first updates there is no measure, so round 1 is repeated.
    assert [f["round"] for f in failures] == [number] * (2 if number == 1 else 1)
    assert {f["node"] for f in failures} == {2}
    assert all("its largest value is " in f["reason"] for f in failures)
    assert all(float(t.abs().max()) < 10 for t in final(directory).values())


def cancelling(height: float) -> Tamper:
    """Return what sends two clients' updates that cancel out in the mean."""

    def tamper(report: Report) -> None:
        ours, theirs = report.examples
        one, other = torch.zeros_like(values(report)).view(2, -1)
        one.fill_(height)
        other.fill_(-height * ours / theirs)
        put(report, torch.cat([one, other]))

    return tamper


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("method", ["flexlora", "fedex-lora"])
def test_updates_of_one_node_that_cancel_out_are_bounded_one_by_one(
    config: Config, method: str, number: int
) -> None:
    config |= {"method": method}
    directory = start(config, RecordingGrid(config, 3, {number: cancelling(1e4)}))
    failures = events(directory, "failure")
    assert [f["round"] for f in failures] == [number] * (2 if number == 1 else 1)
    assert {f["node"] for f in failures} == {2}
    assert all("its largest value is " in f["reason"] for f in failures)
    assert all(float(t.abs().max()) < 10 for t in final(directory).values())


def test_one_of_two_nodes_does_not_make_its_own_bound(config: Config) -> None:
    config |= {"clients.per-round": 2}
    directory = start(config, RecordingGrid(config, 2, {1: filled(1e6)}))
    assert {f["node"] for f in events(directory, "failure")} == {2}
    assert all(float(t.abs().max()) < 10 for t in final(directory).values())


def test_a_run_that_is_resumed_knows_the_sizes_of_updates(config: Config) -> None:
    config |= {"run.keep": 4}
    # One failure more would be one too many for a round.
    config |= {"clients.min-replies": 5}
    tampers = {3: filled(1e5)}
    whole = start(config, RecordingGrid(config, 6, tampers))
    path = whole / "checkpoints" / "round-0002.safetensors"
    ended, failed = final(whole), events(whole, "failure")
    start(config | {"run.resume": str(path)}, RecordingGrid(config, 6, tampers))
    assert [f["reason"] for f in failed] == [
        f["reason"] for f in events(whole, "failure")
    ]
    assert not differ(final(whole), ended)


def test_nobody_is_kept_out_by_small_updates(config: Config) -> None:
    tampers = dict.fromkeys((1, 2), filled(1e-30)) | {3: filled(0.0)}
    grid = RecordingGrid(config, 6, tampers, bad=[1, 2])
    assert not events(start(config, grid), "failure")


def test_a_state_of_an_infinite_loss_is_not_the_best(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([1.0, math.inf, math.nan])
    hits = iter([5, 9, 8])

    def evaluate(self: Trainer, state: State) -> ClassifierEvaluation:
        counts = np.array([[next(hits), 0, 0], [10, 0, 0], [10, 0, 0]])
        return ClassifierEvaluation(next(losses), counts)

    monkeypatch.setattr(Trainer, "evaluate_test", evaluate)
    directory = start(config, RecordingGrid(config))
    assert facts(directory, "best")["round"] == "1"


def test_a_state_that_is_not_finite_is_neither_a_checkpoint_nor_an_end(
    config: Config,
) -> None:
    # Fifty times the rate is beyond float32.
    config |= {"server.lr": 1e37}
    tampers = {1: filled(0.0), 2: filled(50.0), 3: filled(0.0)}
    told = "round 2 ended without a state: its values are not finite twice"
    with pytest.raises(TooFewRepliesError, match=told):
        start(config, RecordingGrid(config, 6, tampers, bad=range(1, 7)))
    folder = Path(str(config["run.dir"])) / "checkpoints"
    assert [path.name for path in sorted(folder.glob("round-*"))] == [
        "round-0001.safetensors"
    ]
    for path in folder.glob("*.safetensors"):
        assert all(bool(t.isfinite().all()) for t in load_file(path).values())
    # From the state before, with updates that do no harm.
    resumed = config | {"run.resume": str(folder / "round-0001.safetensors")}
    tampers[2] = filled(0.0)
    directory = start(resumed, RecordingGrid(config, 6, tampers, bad=range(1, 7)))
    assert [event["round"] for event in events(directory, "round")] == [1, 2, 3]
    assert all(bool(t.isfinite().all()) for t in final(directory).values())


@pytest.mark.parametrize("number", [1, 3])
def test_a_run_goes_on_from_the_round_that_it_is_told(
    config: Config, number: int
) -> None:
    config |= {"rounds": 4, "run.keep": 4}
    whole = start(config, RecordingGrid(config))
    config = elsewhere(config)
    directory = start(config, RecordingGrid(config))
    path = directory / "checkpoints" / f"round-{number:04d}.safetensors"
    grid = RecordingGrid(config)
    start(config | {"run.resume": str(path)}, grid)
    assert [i.server_round for i in grid.asked] == [*range(number + 1, 5)]
    for name in ("last", "averaged", "best"):
        assert not differ(final(directory, name), final(whole, name)), name
        assert facts(directory, name) == facts(whole, name)


def test_a_best_state_of_a_later_round_is_dropped(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    hits = iter([5, 4, 9, 3])

    def evaluate(self: Trainer, state: State) -> ClassifierEvaluation:
        counts = np.array([[next(hits), 0, 0], [10, 0, 0], [10, 0, 0]])
        return ClassifierEvaluation(1.0, counts)

    monkeypatch.setattr(Trainer, "evaluate_test", evaluate)
    config |= {"run.keep": 4}
    directory = start(config, RecordingGrid(config))
    assert facts(directory, "best")["round"] == "3"
    path = directory / "checkpoints" / "round-0002.safetensors"
    start(config | {"run.resume": str(path), "rounds": 3}, RecordingGrid(config))
    # The state of the first round, which was better, is no longer on the disk.
    assert facts(directory, "best")["round"] == "2"


def test_a_checkpoint_that_is_none_is_refused(config: Config) -> None:
    directory = start(config, RecordingGrid(config))
    path = str(directory / "checkpoints" / "last.safetensors")
    with pytest.raises(ConfigError, match="which holds no whole checkpoint; allowed"):
        start(config | {"run.resume": path}, RecordingGrid(config))
