"""Whole runs over in-process nodes: rounds, bad replies, bytes, the run directory."""

import gc
import tomllib
import weakref
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from flwr.app import Array, Message, MessageType, RecordDict

from slora_flwr.client.process import get_process
from slora_flwr.engines.inline import InlineGrid
from slora_flwr.server.run import run
from slora_flwr.wire.messages import Report
from tests.support.grids import RecordingGrid, ShufflingGrid
from tests.support.runs import (
    HEAD_VALUES,
    LAYERS,
    Config,
    differ,
    elsewhere,
    events,
    final,
    payloads,
    start,
)

# The number of nodes, and seeds


@pytest.mark.parametrize(
    "method", ["sft", "lora", "slora", "bitfit", "houlsby", "pfeiffer"]
)
def test_nodes_do_not_change_the_result(config: Config, method: str) -> None:
    config |= {"method": method}
    one = RecordingGrid(config, nodes=1)
    first = start(config, one)
    config = elsewhere(config)
    six = RecordingGrid(config, nodes=6)
    second = start(config, six)
    assert {len(i.clients) for i in one.asked} == {6}
    assert {len(i.clients) for i in six.asked} == {1}
    assert not differ(final(second), final(first))
    assert payloads(second) == payloads(first)
    assert one.mean(3).abs().max() > 1e-4


@pytest.mark.parametrize("method", ["sft", "lora", "slora"])
def test_the_order_of_replies_does_not_change_the_result(
    config: Config, method: str
) -> None:
    config |= {"method": method}
    grids, finals = [], []
    for order in range(3):
        config = elsewhere(config)
        grids.append(ShufflingGrid(config, 5, order))
        finals.append(final(start(config, grids[-1])))
    assert len({tuple(grid.arrivals) for grid in grids}) == 3
    assert not differ(finals[1], finals[0])
    assert not differ(finals[2], finals[0])


class CountingGrid(InlineGrid):
    """Twenty nodes that have answered whenever they are asked; counts live replies."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, nodes=20)
        self.most = 0
        self._replies: list[weakref.ref[Array]] = []

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            if reply.metadata.message_type == MessageType.TRAIN:
                self._replies.append(weakref.ref(Report.read(reply.content).update))
        self.most = max(self.most, sum(array() is not None for array in self._replies))
        return replies


def test_memory_does_not_grow_with_the_replies(config: Config) -> None:
    config |= {"clients.count": 20, "clients.per-round": 20, "rounds": 1}
    grid = CountingGrid(config)
    gc.disable()  # arrays are freed by reference counts, not by a lucky collection
    try:
        start(config, grid)
    finally:
        gc.enable()
    assert grid.most == 1


@pytest.mark.parametrize("mask", ["rows", "columns"])
def test_a_run_with_a_structured_mask(config: Config, mask: str) -> None:
    config |= {"method": "slora", "sparse.mask": mask}
    first = start(config, RecordingGrid(config, nodes=1))
    # 5% of 32 or 48 lines are 2; the head's values travel too.
    lines = {"rows": 4 * 64 + 2 * 32 + 2 * 48, "columns": 4 * 64 + 2 * 48 + 2 * 32}
    sent = LAYERS * lines[mask] + HEAD_VALUES
    assert payloads(first)[0] == (1, "sparse", "down", 6, 6 * 4 * sent)
    [handoff] = events(first, "handoff")
    assert all(energy == pytest.approx(1.0) for energy in handoff["energies"].values())
    config = elsewhere(config)
    assert not differ(
        final(start(config, RecordingGrid(config, nodes=3))), final(first)
    )


def test_nodes_do_not_change_a_warm_start(config: Config) -> None:
    config |= {"method": "slora", "lora.base": "warm-start"}
    first = start(config, RecordingGrid(config, nodes=1))
    config = elsewhere(config)
    second = start(config, RecordingGrid(config, nodes=5))
    assert not differ(final(second), final(first))


def test_a_seed_repeats_a_run_and_another_does_not(config: Config) -> None:
    config |= {"method": "slora", "clients.per-round": 3}
    states, cohorts = [], []
    for seed in (0, 0, 1):
        config = elsewhere(config, seed=seed)
        directory = start(config, RecordingGrid(config, nodes=2))
        states.append(final(directory))
        cohorts.append([e["cohort"] for e in events(directory, "round")])
    assert not differ(states[0], states[1])
    assert differ(states[0], states[2])
    assert cohorts[0] == cohorts[1] != cohorts[2]


# The server optimiser


def test_momentum_starts_anew_after_the_handoff(two_phases: Config) -> None:
    two_phases |= {"server.optimizer": "fedavgm", "server.lr": 0.5}
    grid = RecordingGrid(two_phases, nodes=2)
    start(two_phases, grid)
    assert grid.mean(2).abs().max() > 1e-4
    expected = {
        3: grid.sent(2) + 0.5 * grid.mean(2),
        4: grid.sent(3) + 0.5 * (0.9 * grid.mean(2) + grid.mean(3)),
    }
    for number, state in expected.items():
        torch.testing.assert_close(grid.sent(number), state, rtol=0.0, atol=1e-6)


def test_a_process_that_has_trained_describes_the_untrained_backbone(
    two_phases: Config,
) -> None:
    grid = RecordingGrid(two_phases)
    run(grid, two_phases, run_id=1)
    written = Path(str(two_phases["run.dir"]), "resolved.toml").read_text()
    trainer = get_process(grid._contexts[1]).trainer
    assert trainer.model.adapter.shapes()
    del trainer.model.backbone.digest
    query = Message(RecordDict(), dst_node_id=1, message_type=MessageType.QUERY)
    [number] = grid.push_messages([query])
    [reply] = grid.pull_messages([number])
    described = reply.content.config_records["config"]
    resolved = tomllib.loads(written)["resolved"]
    assert described["backbone"] == resolved["backbone_digest"]


def test_count_zero_is_one_client_for_each_node(config: Config) -> None:
    config = {**config, "clients.count": 0, "clients.per-round": 3}
    grid = RecordingGrid(config, nodes=3)
    start(config, grid)
    pairs = zip(grid.asked_nodes, grid.asked, strict=True)
    assert {(at, *asked.clients) for at, asked in pairs} == {(1, 0), (2, 1), (3, 2)}
