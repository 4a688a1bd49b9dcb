"""Evaluation: by clients and by the server, when, and the round at the target."""

import tomllib
from collections.abc import Iterable

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from slora_flwr.common.tensors import State
from slora_flwr.config import ConfigError
from slora_flwr.runs.events import ClassRecord
from slora_flwr.server import collect
from slora_flwr.tasks.classification import ClassifierEvaluation
from slora_flwr.training.trainer import Trainer
from tests.support.clock import Clock
from tests.support.grids import RecordingGrid
from tests.support.runs import (
    HEAD_VALUES,
    LORA_VALUES,
    Config,
    elsewhere,
    events,
    start,
    summary,
)


def test_clients_evaluate_on_what_they_hold_out(config: Config) -> None:
    trained_on = RecordingGrid(config, nodes=2)
    start(config, trained_on)
    config = elsewhere(config, **{"clients.holdout": 0.25})
    grid = RecordingGrid(config, nodes=2)
    directory = start(config, grid)
    all_sizes = [n for r in trained_on.reports[:2] for n in r.examples]
    sizes = [n for r in grid.reports[:2] for n in r.examples]
    assert sizes == [n - round(n / 4) for n in all_sizes]
    for number, event in enumerate(events(directory, "round")):
        one, other = grid.evaluations[2 * number : 2 * number + 2]
        weights = one["num-examples"], other["num-examples"]
        assert sum(weights) == sum(round(n / 4) for n in all_sizes)
        mean = (weights[0] * one["loss"] + weights[1] * other["loss"]) / sum(weights)
        assert event["client_loss"] == pytest.approx(mean)
        hits = sum(one["hits"]) + sum(other["hits"])
        assert event["client_accuracy"] == pytest.approx(hits / sum(weights))
        assert 0 <= event["client_accuracy"] <= 1


def test_the_last_round_counts_the_servers_test_data_by_class(config: Config) -> None:
    config |= {"clients.holdout": 0.25}
    grid = RecordingGrid(config, nodes=2)
    directory = start(config, grid)
    *others, last = events(directory, "round")
    assert all("classes" not in event for event in others)
    found = ClassRecord(**last["classes"])
    size = sum(found.labels)
    assert sum(found.right) / size == pytest.approx(last["accuracy"])
    assert max(found.labels) / size == pytest.approx(last["majority_accuracy"])
    assert sum(found.predicted) == size
    assert found.is_whole
    resolved = tomllib.loads((directory / "resolved.toml").read_text())["resolved"]
    assert size == resolved["test_examples"]
    # Of what clients hold out, no counts by pair of classes are sent.
    allowed = {"num-examples", "loss", "hits", "predictions", "labels"}
    assert all(set(sent) <= allowed for sent in grid.evaluations)


def test_without_a_holdout_clients_do_not_evaluate(config: Config) -> None:
    grid = RecordingGrid(config)
    directory = start(config, grid)
    assert grid.evaluations == []
    assert all("client_accuracy" not in e for e in events(directory, "round"))


class BadEvaluationGrid(RecordingGrid):
    """Node 2 answers evaluations without figures, or never."""

    silent = False

    def _answer(self, message: Message) -> Message:
        reply = super()._answer(message)
        if self._is_meant(reply):
            reply.content = RecordDict({"other": ConfigRecord({"x": 1})})
        return reply

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = super().pull_messages(message_ids)
        return [r for r in replies if not (self.silent and self._is_meant(r))]

    def _is_meant(self, reply: Message) -> bool:
        facts = reply.metadata
        return (facts.message_type, facts.src_node_id) == (MessageType.EVALUATE, 2)


@pytest.mark.parametrize("silent", [False, True])
def test_a_bad_evaluation_is_named_and_left_out(
    config: Config, monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    monkeypatch.setattr(collect, "time", Clock())
    config |= {"clients.holdout": 0.25}
    grid = BadEvaluationGrid(config, nodes=2)
    grid.silent = silent
    directory = start(config, grid)
    # A node that was silent in two rounds rests in the third.
    rounds = [1, 2] if silent else [1, 2, 3]
    failures = events(directory, "failure")
    assert [(f["round"], f["node"]) for f in failures] == [(n, 2) for n in rounds]
    assert all("client_accuracy" in e for e in events(directory, "round"))


def test_evaluation_can_wait_for_the_end_of_a_phase(two_phases: Config) -> None:
    two_phases |= {"run.eval-every": 0}
    directory = start(two_phases, RecordingGrid(two_phases))
    evaluated = [e["round"] for e in events(directory, "round") if "accuracy" in e]
    assert evaluated == [1, 4]


def test_the_summary_names_the_first_round_at_the_target(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = iter([0.4, 0.7, 0.6])

    def evaluate(self: Trainer, state: State) -> ClassifierEvaluation:
        hits = round(10 * next(accuracies))
        return ClassifierEvaluation(
            1.0, np.array([[hits, 0, 0], [10, 0, 0], [10, 0, 0]])
        )

    monkeypatch.setattr(Trainer, "evaluate_test", evaluate)
    config |= {"run.target": 0.6}
    target = summary(start(config, RecordingGrid(config)))["target"]
    assert target["round"] == 2
    assert target["payload_bytes"] == 2 * 2 * 6 * 4 * (LORA_VALUES + HEAD_VALUES)


def test_a_classifiers_target_is_an_accuracy(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"run\.target is 1\.1; allowed: a number"):
        start(config | {"run.target": 1.1}, RecordingGrid(config))


def test_a_target_that_is_not_reached_is_not_in_the_summary(config: Config) -> None:
    config |= {"run.target": 1.0, "rounds": 1, "lora.lr": 1e-9}
    assert "target" not in summary(start(config, RecordingGrid(config)))
