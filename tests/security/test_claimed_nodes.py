"""The number of nodes that a node claims to be of."""

import pytest
from flwr.app import Message

from tests.support.clock import Clock
from tests.support.fleet import FakeGrid, gathered


class SlowGrid(FakeGrid):
    """Node 2 answers after 3 seconds; node 1 is hostile and answers at once."""

    def __init__(self, clock: Clock, claimed: int) -> None:
        super().__init__([1, 2])
        self._clock, self._claimed = clock, claimed
        self.silent = {2}

    def _answer(self, message: Message) -> Message:
        reply = super()._answer(message)
        if message.metadata.dst_node_id == 1:
            reply.content.config_records["config"]["nodes"] = self._claimed
        return reply

    def get_node_ids(self) -> list[int]:
        if self._clock.now > 3:
            self.silent.clear()
        return self.online


@pytest.mark.parametrize("claimed", [10**9, 3])
def test_nobody_waits_for_nodes_of_which_others_do_not_tell(
    clock: Clock, claimed: int
) -> None:
    found = gathered(SlowGrid(clock, claimed))
    assert set(found.assign(range(6))) == {1, 2}
    assert clock.now < 5


@pytest.mark.parametrize("claimed", [0, -1])
def test_a_number_of_nodes_is_one_or_more(clock: Clock, claimed: int) -> None:
    found = gathered(SlowGrid(clock, claimed))
    assert set(found.assign(range(6))) == {2}
    assert found.left_out == {1: f"it is of {claimed} nodes; allowed: 1 or more"}
