"""A name and a client number belong to the key that had them first."""

import json
from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import Message, MessageType
from flwr.proto.node_pb2 import NodeInfo

from slora_flwr.runs.events import Event, NodeLeftOut
from slora_flwr.server.own_data_fleet import OwnDataFleet
from tests.support.own_data import HospitalGrid, hospital

pytestmark = pytest.mark.usefixtures("clock")


class KeyGrid(HospitalGrid):
    """Nodes with keys, of which some are registered under a name."""

    def __init__(self, **hospitals: dict[str, Any]) -> None:
        super().__init__({})
        self.keys: dict[int, bytes] = {}
        self.registered: dict[int, str] = {}
        self.silent: set[int] = set()
        self.told: list[Event] = []

    def add(
        self, node: int, key: str, told: dict[str, Any], registered: str = ""
    ) -> None:
        self.nodes[node], self.keys[node] = told, key.encode()
        self.since[node] = self.since.get(node, "") + "again"
        self.registered[node] = registered

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [
            NodeInfo(
                node_id=node,
                last_activated_at=at,
                public_key=self.keys[node],
                name=self.registered[node] or None,
            )
            for node, at in self.since.items()
        ]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        heard = {i: self._sent[i] for i in message_ids if i in self._sent}
        return super().pull_messages(
            [i for i, m in heard.items() if m.metadata.dst_node_id not in self.silent]
        )

    def gathered(self, agreed: dict[str, Any] | None = None) -> OwnDataFleet:
        found = OwnDataFleet({"protocol": 7}, 1, 5.0)
        if agreed is not None:
            found.restore(agreed)
        found.gather(self, self.told.append)
        return found

    def refused(self) -> list[tuple[int, str]]:
        return [(e.node, e.reason) for e in self.told if isinstance(e, NodeLeftOut)]


@pytest.fixture
def grid() -> KeyGrid:
    grid = KeyGrid()
    grid.add(7, "honest", hospital("a", x=3, y=1))
    grid.add(8, "other", hospital("b", x=1, y=1))
    return grid


def hang(node: int, grid: KeyGrid, found: OwnDataFleet) -> None:
    """Have a node of the fleet be silent, in a round and about itself."""
    grid.silent.add(node)
    found.note_silence(node, MessageType.TRAIN)


def test_the_second_with_a_name_is_refused_and_named(grid: KeyGrid) -> None:
    found = grid.gathered()
    # The honest one was silent, and has not yet answered another query.
    hang(7, grid, found)
    grid.add(9, "hostile", hospital("a", x=9, y=9))
    found.refresh(grid)
    assert found.clients == [1]
    grid.silent.clear()
    found.refresh(grid)
    assert found.sizes == {0: 4, 1: 2}
    assert found.assign([0, 1]) == {7: [0], 8: [1]}
    assert grid.refused() == [(9, "the name a is that of a (node 7)")]


def test_another_name_does_not_get_a_number_either(grid: KeyGrid) -> None:
    found = grid.gathered()
    hang(7, grid, found)
    grid.add(9, "hostile", hospital("z", x=9, y=9) | {"client": 0})
    found.refresh(grid)
    assert found.clients == [1]
    grid.silent.clear()
    found.refresh(grid)
    assert found.assign([0, 1]) == {7: [0], 8: [1]}
    assert grid.refused() == [(9, "client 0 is that of a (node 7)")]


def test_an_owner_that_comes_back_gets_its_number_back(grid: KeyGrid) -> None:
    """A node of the same key, whatever Flower's id for it is."""
    found = grid.gathered()
    del grid.since[7]
    grid.add(9, "hostile", hospital("a", x=9, y=9))
    found.refresh(grid)
    assert found.assign([0]) == {9: [0]}
    grid.add(10, "honest", hospital("a", x=3, y=1))
    found.refresh(grid)
    assert found.assign([0, 1]) == {10: [0], 8: [1]}
    assert found.sizes[0] == 4
    reason = "client 0 is that of a (node 10), which is back"
    assert grid.refused() == [(9, reason)]
    found.refresh(grid)
    assert found.assign([0, 1])[10] == [0]


def test_a_node_without_a_lasting_key_waits_until_its_old_self_is_gone(
    grid: KeyGrid,
) -> None:
    """The SuperLink notices after a while that a killed node is no longer there."""
    found = grid.gathered()
    grid.add(9, "new key", hospital("a", x=3, y=1))
    found.refresh(grid)
    assert [node for node, _ in grid.refused()] == [9]
    del grid.since[7]
    found.refresh(grid)
    assert found.assign([0, 1]) == {9: [0], 8: [1]}


def test_a_registered_name_is_the_nodes_name(grid: KeyGrid) -> None:
    grid.add(9, "hostile", hospital("a", x=9, y=9), registered="c")
    found = grid.gathered()
    assert found.assign([0, 1, 2]) == {7: [1], 8: [2], 9: [0]}
    assert found.name(9) == "c (node 9)"


def test_a_registered_name_is_refused_to_others_even_while_its_owner_is_away() -> None:
    grid = KeyGrid()
    grid.add(7, "honest", hospital("whatever", x=3, y=1), registered="a")
    grid.add(8, "other", hospital("b", x=1, y=1))
    found = grid.gathered()
    del grid.since[7]
    grid.add(9, "hostile", hospital("a", x=9, y=9))
    grid.add(10, "hostile too", hospital("z", x=9, y=9) | {"client": 0})
    found.refresh(grid)
    assert found.clients == [1]
    assert grid.refused() == [
        (9, "the name a is that of a registered node"),
        (10, "client 0 is that of a registered node"),
    ]
    grid.add(7, "honest", hospital("whatever", x=3, y=1), registered="a")
    found.refresh(grid)
    assert found.assign([0, 1]) == {7: [0], 8: [1]}


@pytest.mark.parametrize("first", [6, 8])
def test_a_registered_name_goes_before_what_others_say(first: int) -> None:
    grid = KeyGrid()
    grid.add(first, "hostile", hospital("a", x=9, y=9) | {"client": 0})
    grid.add(7, "honest", hospital("n", x=3, y=1), registered="a")
    found = grid.gathered()
    assert found.assign([0]) == {7: [0]}
    assert [node for node, _ in grid.refused()] == [first]


def test_a_registered_name_is_kept_for_its_node_before_that_takes_part() -> None:
    grid = KeyGrid()
    grid.add(7, "honest", hospital("n", x=3, y=1), registered="a")
    grid.add(8, "other", hospital("b", x=1, y=1))
    grid.silent.add(7)
    grid.add(9, "hostile", hospital("a", x=9, y=9))
    found = grid.gathered()
    assert found.clients == [0]
    reason = "the name a is that of a registered node"
    assert (9, reason) in grid.refused()
    grid.silent.clear()
    found.refresh(grid)
    assert found.assign([0, 1]) == {7: [1], 8: [0]}
    assert found.left_out == {9: reason}


def test_the_second_that_is_registered_under_a_name_is_refused() -> None:
    grid = KeyGrid()
    grid.add(7, "one", hospital("n", x=3, y=1), registered="a")
    grid.add(8, "other", hospital("m", x=1, y=1), registered="a")
    found = grid.gathered()
    assert found.assign([0]) == {7: [0]}
    assert grid.refused() == [(8, "the name a is that of a (node 7)")]


def test_a_key_that_is_registered_anew_gets_the_name() -> None:
    grid = KeyGrid()
    grid.add(7, "lost", hospital("n", x=3, y=1), registered="a")
    found = grid.gathered()
    grid.add(8, "new", hospital("n", x=3, y=1), registered="a")
    found.refresh(grid)
    assert found.assign([0]) == {7: [0]}
    del grid.since[7]  # revoked
    found.refresh(grid)
    assert found.assign([0]) == {8: [0]}


def test_owners_are_remembered_by_a_run_that_is_resumed(grid: KeyGrid) -> None:
    agreed = grid.gathered().agreed()
    # Now the hostile node has the smaller id.
    again = KeyGrid()
    again.add(3, "hostile", hospital("a", x=9, y=9))
    again.add(7, "honest", hospital("a", x=3, y=1))
    found = again.gathered(agreed)
    assert found.assign([0]) == {7: [0]}
    assert again.refused() == [(3, "the name a is that of a (node 7)")]


def test_a_number_stays_with_the_first_that_had_it(grid: KeyGrid) -> None:
    """Even if another node has it in the meantime, under another name."""
    found = grid.gathered()
    del grid.since[7]
    grid.add(8, "other", hospital("b", x=1, y=1) | {"client": 0})
    found.refresh(grid)
    assert found.assign([0]) == {8: [0]}
    grid.add(10, "honest", hospital("a", x=3, y=1))
    found.refresh(grid)
    assert found.assign([0]) == {10: [0]}
    reason = "client 0 is that of a (node 10), which is back"
    assert grid.refused() == [(8, reason)]


def test_a_number_goes_with_its_key_whatever_the_node_is_called(grid: KeyGrid) -> None:
    found = grid.gathered()
    grid.add(7, "honest", hospital("renamed", x=3, y=1) | {"client": 0})
    found.refresh(grid)
    grid.add(9, "hostile", hospital("a!", x=9, y=9) | {"client": 0})
    found.refresh(grid)
    assert found.assign([0, 1]) == {7: [0], 8: [1]}
    assert grid.refused() == [(9, "client 0 is that of renamed (node 7)")]


def test_owners_of_numbers_are_remembered_by_a_run_that_is_resumed(
    grid: KeyGrid,
) -> None:
    agreed = json.loads(json.dumps(grid.gathered().agreed()))
    again = KeyGrid()
    again.add(3, "hostile", hospital("!", x=9, y=9) | {"client": 0})
    again.add(7, "honest", hospital("renamed", x=3, y=1) | {"client": 0})
    found = again.gathered(agreed)
    assert found.assign([0]) == {7: [0]}
    assert again.refused() == [(3, "client 0 is that of renamed (node 7)")]


def test_a_key_has_one_number_at_a_time(grid: KeyGrid) -> None:
    found = grid.gathered()
    for number in (5, 6, 2):
        grid.add(9, "hostile", hospital("z", x=9, y=9) | {"client": number})
        found.refresh(grid)
    assert found.clients == [0, 1, 2]
    grid.add(10, "new", hospital("c", x=2, y=1) | {"client": 5})
    grid.add(11, "newer", hospital("d", x=2, y=1))
    found.refresh(grid)
    assert found.assign([2, 3, 5]) == {9: [2], 10: [5], 11: [3]}


def test_nodes_refused_a_number_get_it_once_its_holder_is_gone() -> None:
    """Or has another."""
    grid = KeyGrid()
    for node, name in ((7, "a"), (8, "b"), (9, "c")):
        grid.add(node, name, hospital(name, x=3, y=1) | {"client": 5})
    found = grid.gathered()
    assert found.assign([5]) == {7: [5]}
    grid.add(7, "a", hospital("a", x=3, y=1) | {"client": 6})
    found.refresh(grid)
    assert found.assign([5, 6]) == {7: [6], 8: [5]}
    del grid.since[8]
    found.refresh(grid)
    assert found.assign([5, 6]) == {7: [6], 9: [5]}
    assert not found.left_out
