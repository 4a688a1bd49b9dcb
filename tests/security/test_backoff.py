"""A node that answers queries and nothing else does not make every round last."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from flwr.app import Message, MessageType

from slora_flwr.common.random import sample_cohort
from slora_flwr.server.fleet import LONGEST_REST
from tests.support.clock import Clock
from tests.support.fleet import FakeGrid, gathered
from tests.support.grids import RecordingGrid
from tests.support.runs import CLIENTS, Config, events, start

TRAIN, EVALUATE = MessageType.TRAIN, MessageType.EVALUATE


pytestmark = pytest.mark.usefixtures("clock")


class StallingGrid(RecordingGrid):
    """Node 2 describes itself, and does not answer messages of some kind."""

    def __init__(self, config: Config, kind: str, *answered: int) -> None:
        super().__init__(config, 3)
        self._kind, self._answered = kind, answered
        self.stalled: list[int] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        for message in sent:
            if self._stalls(message):
                self.stalled.append(int(message.metadata.group_id))
        return super().push_messages(sent)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return super().pull_messages(
            [i for i in message_ids if i in self._sent and not self._stalls_at(i)]
        )

    def _stalls_at(self, sent: str) -> bool:
        return self._stalls(self._sent[sent])

    def _stalls(self, message: Message) -> bool:
        told = message.metadata
        is_kind = told.dst_node_id == 2 and told.message_type == self._kind
        return is_kind and int(told.group_id) not in self._answered


def stalled(config: Config, kind: str, rounds: int, *answered: int) -> list[int]:
    """Return the rounds that a node stalled, and check that the others went on."""
    config |= {"rounds": rounds, "run.eval-every": 1, "clients.holdout": 0.2}
    grid = StallingGrid(config, kind, *answered)
    directory = start(config, grid)
    assert [told["round"] for told in events(directory, "round")] == [
        *range(1, rounds + 1)
    ]
    for told in events(directory, "round"):
        assert told["cohort"] == CLIENTS  # which each of the nodes can train
    check_told(directory, grid.stalled, kind)
    return grid.stalled


def check_told(directory: Path, rounds: list[int], kind: str) -> None:
    told = events(directory, "left_out")
    assert all(event["node"] == 2 and kind in event["reason"] for event in told)
    assert all("rests for" in event["reason"] for event in told)
    assert told or len(rounds) < 2


def test_a_node_that_never_trains_rests_for_more_and_more_rounds(
    config: Config,
) -> None:
    # Rests of 1, 2 and 4 rounds.
    assert stalled(config, TRAIN, 15) == [1, 2, 4, 7, 12]


def test_a_node_that_trains_and_never_evaluates_rests_too(
    config: Config,
) -> None:
    assert stalled(config, EVALUATE, 8) == [1, 2, 4, 7]


def test_a_good_reply_begins_the_count_anew(config: Config) -> None:
    assert stalled(config, TRAIN, 9, 4) == [1, 2, 5, 6, 8]


def test_a_rest_is_bounded() -> None:
    known = gathered(FakeGrid([1, 2]))
    for _ in range(20):
        known.note_silence(2, TRAIN)
    rest = f"rests for {LONGEST_REST} rounds"
    assert known.left_out[2].endswith(rest)


@pytest.mark.parametrize("wanted", [1, 3])
def test_nobody_waits_for_nodes_that_rest(clock: Clock, wanted: int) -> None:
    grid = FakeGrid([1, 2])
    grid.hosts = {1: [0, 1], 2: [2]}
    known = gathered(grid)
    for number in (1, 2):
        known.refresh(grid, wanted, number)
        known.note_silence(2, TRAIN)
    before = clock.now
    known.refresh(grid, wanted, 3)
    assert clock.now - before <= 0.2
    # It takes part after all if its clients are needed.
    assert known.clients == ([0, 1, 2] if wanted == 3 else [0, 1])


def test_without_silent_nodes_cohorts_are_what_they_were(config: Config) -> None:
    config |= {"clients.per-round": 2, "rounds": 4}
    directory = start(config, RecordingGrid(config, 3))
    for told in events(directory, "round"):
        assert told["cohort"] == sample_cohort(CLIENTS, 2, 0, told["round"])
    assert not events(directory, "left_out")
