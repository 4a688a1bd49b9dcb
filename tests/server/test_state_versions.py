"""States as differences from those that a node has."""

from typing import Any

import torch

from slora_flwr.client.process import make_process
from slora_flwr.common.tensors import State
from slora_flwr.server.state_versions import StateVersions
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.messages import Instruction
from tests.support.grids import Grid
from tests.support.runs import (
    HEAD_VALUES,
    LORA_VALUES,
    LOSSLESS,
    Config,
    differ,
    elsewhere,
    events,
    final,
    payloads,
    start,
)


class Forgetful(Grid):
    """In round 3 the nodes' process is a new one, without the state of round 2."""

    def before(self, asked: Instruction) -> None:
        if asked.server_round == 3 and asked.since:
            make_process.cache_clear()


def test_a_client_with_the_last_state_gets_the_difference(config: Config) -> None:
    config |= LOSSLESS | {"method": "lora", "rounds": 4, "run.eval-every": 0}
    grid = Grid(config, nodes=2)
    start(config, grid)
    assert [bool(asked.since) for asked in grid.asked] == [False] * 2 + [True] * 6


def test_who_missed_a_round_gets_all(config: Config) -> None:
    config |= LOSSLESS | {"rounds": 6, "clients.per-round": 3, "run.eval-every": 0}
    grid = Grid(config, nodes=6)
    directory = start(config, grid)
    assert events(directory, "failure") == []
    # Three nodes train three clients each round: they get differences from round 2 on.
    changes = {i.server_round: len(i.state.data) for i in grid.asked if i.since}
    assert changes.keys() == {2, 3, 4, 5, 6}
    # The ledger counts clients, of whom few were in the cohort before.
    down = {n: size for n, _, way, _, size in payloads(directory) if way == "down"}
    cohorts = {e["round"]: set(e["cohort"]) for e in events(directory, "round")}
    had = {n: len(cohorts[n] & cohorts[n - 1]) for n in changes}
    assert {*had.values()} >= {1, 2}
    for number in [n for n in changes if had[n] < 3]:
        change = changes[number]
        whole, rest = divmod(down[number] - had[number] * change, 3 - had[number])
        assert (rest, whole > 1.01 * change) == (0, True)
        assert whole <= 4 * (LORA_VALUES + HEAD_VALUES)


def test_a_node_that_lost_the_state_is_sent_it_whole(config: Config) -> None:
    config |= LOSSLESS | {"rounds": 4, "run.eval-every": 0}
    undisturbed = start(config, Grid(config))
    config = elsewhere(config)
    grid = Forgetful(config)
    directory = start(config, grid)
    assert [(i.server_round, bool(i.since)) for i in grid.asked] == [
        (1, False),
        (2, True),
        (3, True),
        (3, False),
        (4, False),  # it may keep nothing
    ]
    assert events(directory, "failure") == []
    assert not differ(final(directory), final(undisturbed))


def test_a_broadcast_by_hand() -> None:
    """Versions of three states; who has the last, the one before, or none."""
    codec = Codec("int8", lossless=True, head=2)
    known = {"x": torch.linspace(0.0, 1.0, 1000)}
    versions = StateVersions(codec, known)
    states: list[State] = []
    for step in (0.0, 1e-3, 2e-3):
        sent = {"x": known["x"] + step * torch.arange(1000) / 1000, "y": torch.ones(2)}
        read = versions.publish(sent)
        # int8 of the difference to what is known, not of the values themselves.
        assert (read["x"] - sent["x"]).abs().max() <= step / 254 + 1e-7
        states.append(read)
        if step == 0.0:
            versions.received(1, [10])
        if step == 1e-3:
            versions.received(2, [20])
    whole, since = versions.encode_for(3)
    assert since == ""
    assert versions.encode_for(1) == (whole, "")  # it missed one
    change, since = versions.encode_for(2)
    assert since != ""
    assert len(change.data) < len(whole.data)
    assert versions.encode_for(2, anew=True) == (whole, "")
    assert versions.bytes_due([10, 20, 30]) == 2 * len(whole.data) + len(change.data)


def test_the_same_state_twice_is_no_new_version() -> None:
    """After an evaluation the next round's clients have their state already."""
    versions = StateVersions(Codec(lossless=True), {})
    state: dict[str, Any] = {"x": torch.randn(1000)}
    versions.publish(state)
    versions.received(1, [1])
    versions.publish({"x": state["x"].clone()})
    change, since = versions.encode_for(1)
    assert since != ""
    assert len(change.data) < 100
