"""Progress within a round, by a clock that passes only by sleeping."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from slora_flwr.reports.progress import CohortProgress, Within, read_line
from slora_flwr.server.run import run
from tests.support.clock import Clock
from tests.support.grids import RecordingGrid
from tests.support.runs import Config, elsewhere, events, final, ledger, start

# Clients that answer one a second are told of after ten seconds more, or a quarter.
TOLD = {10: "0:10", 20: "0:20", 30: "0:30", 40: "0:40", 50: "0:50", 63: "1:03"}
TOLD |= {79: "1:19", 99: "1:39", 124: "2:04", 155: "2:35", 194: "3:14", 243: "4:03"}
TOLD |= {304: "5:04", 380: "6:20", 475: "7:55", 594: "9:54", 743: "12:23"}
TOLD |= {929: "15:29"}


class SlowGrid(RecordingGrid):
    """Nodes each of whose clients takes six seconds."""

    def __init__(self, config: Config, nodes: int = 1) -> None:
        super().__init__(config, nodes)
        self.clock = Clock()
        self.progress = CohortProgress(now=self.clock.monotonic)
        self.tell(self._hear)

    def _hear(self, clients: Iterable[int]) -> None:
        self.clock.sleep(6.0)
        self.progress.hear(clients)


def run_slowly(config: Config, nodes: int = 1) -> Path:
    grid = SlowGrid(config, nodes)
    run(grid, config, grid.run.run_id, share=grid.share, progress=grid.progress)
    return Path(str(config["run.dir"]))


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [record.getMessage() for record in caplog.records]
    return [line for line in lines if isinstance(read_line("INFO", line), Within)]


def without_seconds(path: Path) -> list[dict[str, Any]]:
    found = events(path, "round")
    for event in found:
        del event["seconds"]
        for client in event["clients"].values():
            del client["seconds"]
    return found


def test_lines_become_fewer_as_a_round_grows_long(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "flwr")
    clock = Clock()
    progress = CohortProgress(now=clock.monotonic)
    for _ in range(2):  # what is told of one round changes nothing in the next
        with progress.follow("round  3/12 lora", 1000):
            for client in range(990):
                clock.sleep(1.0)
                progress.hear([client])
        progress.hear([999])
        assert told(caplog) == [
            f"round  3/12 lora: {n} of 1000 clients answered after {passed}"
            for n, passed in TOLD.items()
        ]
        caplog.clear()


@pytest.mark.parametrize("nodes", [1, 2, 6])
def test_a_long_round_says_how_many_have_answered(
    config: Config, caplog: pytest.LogCaptureFixture, nodes: int
) -> None:
    caplog.set_level("INFO", "flwr")
    path = run_slowly(config, nodes)
    assert told(caplog) == [
        f"round {number}/3 lora: {clients} of 6 clients answered after {after}"
        for number in (1, 2, 3)
        for clients, after in ((2, "0:12"), (4, "0:24"))
    ]
    caplog.clear()
    other = elsewhere(config)
    plain = start(other, RecordingGrid(other, nodes))
    assert told(caplog) == []  # no client takes ten seconds of this clock
    assert without_seconds(path) == without_seconds(plain)
    assert ledger(path) == ledger(plain)
    for name, tensor in final(plain).items():
        assert torch.equal(final(path)[name], tensor)


def test_a_long_evaluation_says_so_too(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "flwr")
    run_slowly(config | {"rounds": 1, "clients.holdout": 0.2})
    assert told(caplog)[2:] == [
        "round 1/1 evaluation: 2 of 6 clients answered after 0:12",
        "round 1/1 evaluation: 4 of 6 clients answered after 0:24",
    ]


def test_a_private_run_does_not_say_how_many_were_drawn(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "flwr")
    privacy: Config = {
        "privacy.noise-multiplier": 1.0,
        "privacy.clip-norm": 1.0,
        "privacy.delta": 0.01,
    }
    run_slowly(config | privacy)
    assert told(caplog) == []
