"""Updates and sums that are finite and would spoil a state, or end a run."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from slora_flwr.server.run import run
from slora_flwr.server.strategy import TooFewRepliesError
from slora_flwr.wire.messages import Report
from tests.support.grids import RecordingGrid, Tamper, values
from tests.support.runs import Config, events, final

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
        spoilt = values(report).clone().fill_(value)
        report.update.data = spoilt.numpy().tobytes()

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


def test_noise_that_leaves_the_range_of_sums_is_a_failed_round(config: Config) -> None:
    config |= PRIVATE | {"privacy.clip-norm": 2.0**32, "privacy.noise-multiplier": 0.5}
    told = "round 1 ended without a state: the update of .* too large twice"
    with pytest.raises(TooFewRepliesError, match=told):
        start(config, RecordingGrid(config, nodes=2))
