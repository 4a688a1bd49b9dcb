"""Figures of nodes that decide which state is the best."""

from typing import Any

import pytest
from flwr.app import Message, MessageType

from tests.support.grids import RecordingGrid
from tests.support.runs import Config, events, start


class ClaimingGrid(RecordingGrid):
    """Node 2 claims to have evaluated on as many examples as it likes, all right."""

    def __init__(self, config: Config, claimed: int) -> None:
        super().__init__(config, nodes=3)
        self._claimed = claimed

    def _answer(self, message: Message) -> Message:
        reply = super()._answer(message)
        facts = message.metadata
        if (facts.message_type, facts.dst_node_id) == (MessageType.EVALUATE, 2):
            metrics: Any = reply.content.metric_records["metrics"]
            counts = [self._claimed] + [0] * (len(metrics["hits"]) - 1)
            metrics.update(dict.fromkeys(("hits", "predictions", "labels"), counts))
            metrics["num-examples"] = self._claimed
        return reply


@pytest.mark.parametrize("claimed", [10**7, 40])
def test_an_evaluation_on_more_than_is_held_out_is_refused(
    config: Config, claimed: int
) -> None:
    config |= {"clients.holdout": 0.2}
    directory = start(config, ClaimingGrid(config, claimed))
    failures = events(directory, "failure")
    assert [(f["round"], f["node"]) for f in failures] == [(1, 2), (2, 2), (3, 2)]
    told = f"it evaluates on {claimed} examples, and holds out "
    assert all(told in f["reason"] for f in failures)
    shares = [e["client_accuracy"] for e in events(directory, "round")]
    assert max(shares) < 1


def test_each_nodes_figures_are_visible(config: Config) -> None:
    config |= {"clients.holdout": 0.2}
    grid = RecordingGrid(config, nodes=3)
    found = events(start(config, grid), "evaluation")
    assert [(e["round"], e["node"]) for e in found] == [
        (number, node) for number in (1, 2, 3) for node in (1, 2, 3)
    ]
    assert [e["examples"] for e in found] == [
        told["num-examples"] for told in grid.evaluations
    ]
    assert [e["loss"] for e in found] == [told["loss"] for told in grid.evaluations]
