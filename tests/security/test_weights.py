"""Nodes that claim many examples, to own the mean and the choice of the best state."""

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, MessageType

from slora_flwr.server.run import run
from tests.support.grids import RecordingGrid
from tests.support.own_data import NodesGrid, make_own_data_config, nodes_of
from tests.support.runs import Config, differ, events, final, start

MANY = 3 * 10**6


class ClaimingGrid(NodesGrid):
    """Node 2 claims millions of examples, wherever it is asked about them."""

    def _answer(self, message: Message) -> Message:
        reply = super()._answer(message)
        kind, node = message.metadata.message_type, message.metadata.dst_node_id
        if node != 2:
            return reply
        metrics: Any = reply.content.metric_records["metrics"]
        if kind == MessageType.QUERY:
            metrics["examples"] = [MANY // 2] * len(metrics["examples"])
        elif kind == MessageType.TRAIN:
            metrics["examples"] = [MANY // 2]
        else:
            counts = [MANY // 10] + [0] * (len(metrics["hits"]) - 1)
            metrics.update(dict.fromkeys(("hits", "predictions", "labels"), counts))
            metrics["num-examples"] = MANY // 10
        return reply


@pytest.fixture
def own(tmp_path: Path, tiny_models: dict[str, Path]) -> Config:
    return make_own_data_config(tmp_path, tiny_models["bert"])


def test_a_claim_of_millions_is_bounded(own: Config, tmp_path: Path) -> None:
    own |= {"rounds": 2, "clients.max-weight": 30}
    run(ClaimingGrid(own, nodes_of(tmp_path)), own, 1)
    directory = Path(str(own["run.dir"]))
    reasons = [f["reason"] for f in events(directory, "failure")]
    assert len(reasons) == 2
    assert all("its weights are [1500000], not from 1 to [30]" in r for r in reasons)
    rounds = events(directory, "round")
    # 35 and 40 examples are trained on.
    weights = [{c: did["examples"] for c, did in r["clients"].items()} for r in rounds]
    assert weights == [{"0": 30, "2": 30}] * 2
    assert max(r["accuracy"] for r in rounds) < 1


def test_a_claimed_evaluation_is_bounded(own: Config, tmp_path: Path) -> None:
    class Evaluating(ClaimingGrid):
        def _answer(self, message: Message) -> Message:
            if message.metadata.message_type == MessageType.TRAIN:
                return NodesGrid._answer(self, message)
            return super()._answer(message)

    own |= {"rounds": 2, "clients.max-weight": 9}
    run(Evaluating(own, nodes_of(tmp_path)), own, 1)
    directory = Path(str(own["run.dir"]))
    told = "it evaluates on 300000 examples, and holds out 9"
    assert [f["reason"] for f in events(directory, "failure")] == [told] * 2
    # 5 and 10 examples are held out, and whole fives are evaluated on.
    found = {(e["node"], e["examples"]) for e in events(directory, "evaluation")}
    assert found == {(1, 5), (3, 5)}


def test_weights_do_not_depend_on_how_clients_are_spread(config: Config) -> None:
    config |= {"clients.partitioner": "dirichlet", "clients.alpha": 1.0}
    config |= {"clients.holdout": 0.4}
    ends, weights, evaluated = {}, {}, {}
    for nodes, most in ((6, 0), (6, 12), (3, 12)):
        config |= {"run.dir": f"{config['run.dir']}x", "clients.max-weight": most}
        directory = start(config, RecordingGrid(config, nodes))
        ends[nodes, most] = final(directory)
        done = events(directory, "round")[-1]
        weights[nodes, most] = [d["examples"] for d in done["clients"].values()]
        evaluated[nodes, most] = done["client_accuracy"]
    assert not differ(ends[6, 12], ends[3, 12])
    assert differ(ends[6, 0], ends[6, 12])
    assert sorted(weights[3, 12]) == sorted(min(n, 12) for n in weights[6, 0])
    assert evaluated[6, 12] == evaluated[3, 12]
