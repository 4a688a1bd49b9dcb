"""Runs that may end, or have ended, near the majority class: what users are told."""

import logging
from pathlib import Path

import numpy as np
import pytest

from slora_flwr.common.tensors import State
from slora_flwr.config import parse
from slora_flwr.engines.inline import InlineGrid
from slora_flwr.reports.chance import foresee, tell_chance
from slora_flwr.reports.run_page import report
from slora_flwr.runs.reader import read_run
from slora_flwr.server.run import run
from slora_flwr.tasks.classification import ClassifierEvaluation
from slora_flwr.training.trainer import Trainer
from tests.support.grids import RecordingGrid
from tests.support.own_data import NodesGrid, make_own_data_config, nodes_of
from tests.support.runs import Config, elsewhere, start, summary

NEAR = "within two points of the majority class's share of the test texts"
# News Category, where runs have ended at the majority class: 20 rounds of 5 at 0.1.
SKEWED: Config = {
    "model.name": "minilm",
    "data.name": "news-category",
    "rounds": 20,
    "clients.count": 50,
    "clients.per-round": 5,
    "clients.alpha": 0.1,
}


def evaluate_as(monkeypatch: pytest.MonkeyPatch, hits: int) -> None:
    """Let every state get that many of 100 test texts right; 40 are of one class."""
    found = ClassifierEvaluation(
        1.0, np.array([[hits, 0, 0], [100, 0, 0], [40, 30, 30]])
    )

    def evaluate(self: Trainer, state: State) -> ClassifierEvaluation:
        return found

    monkeypatch.setattr(Trainer, "evaluate_test", evaluate)


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


# At the end


@pytest.mark.parametrize(
    ("hits", "told"),
    [
        (43, ""),
        (42, NEAR),
        (38, NEAR),
        (37, "below the majority class's share of the test texts, 40.0%"),
    ],
)
def test_the_closing_lines_the_summary_and_the_report_say_so(
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    hits: int,
    told: str,
) -> None:
    evaluate_as(monkeypatch, hits)
    config |= {"rounds": 1}
    directory = start(config, RecordingGrid(config))
    lines = printed(capsys)
    assert ("majority class's share" in lines) == bool(told)
    assert told in lines
    warning = summary(directory).get("warning", "")
    assert warning in lines
    assert bool(warning) == bool(told)
    assert report(read_run(directory)).notice == warning


def test_private_runs_say_so_in_files_that_stay(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is printed depends on two figures that the line above has anyway."""
    config |= {"rounds": 1, "privacy.clip-norm": 1.0, "privacy.delta": 0.01}
    config |= {"privacy.noise-multiplier": 1.0}
    for hits in (40, 90):
        evaluate_as(monkeypatch, hits)
        directory = start(config, RecordingGrid(config))
        assert ("warning" in summary(directory)) == (hits == 40)
        for path in directory.glob("**/*"):
            if path.is_file() and path.name != "summary.json":
                assert b"majority class's share" not in path.read_bytes()
        config = elsewhere(config)


def test_held_out_texts_of_nodes_count_where_the_server_has_none(
    tmp_path: Path,
    tiny_models: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_own_data_config(tmp_path, tiny_models["bert"])
    # Nothing is learned at this rate.
    config |= {"lora.lr": 1e-12, "sparse.lr": 1e-12}
    told = run(NodesGrid(config, nodes_of(tmp_path)), config, run_id=1)
    assert "of the clients' held-out texts" in told["warning"]
    assert "Try more rounds" in told["warning"]
    assert "clients.alpha" not in told["warning"]
    assert told["warning"] in printed(capsys)
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "| clients' held-out texts | accuracy " in card


def test_it_names_what_the_config_can_change() -> None:
    figures = {"accuracy": 0.3, "majority_accuracy": 0.3}

    def tried(changes: Config) -> str:
        return tell_chance(parse(SKEWED | changes), figures).split("Try ")[1]

    alpha, more = "a larger clients.alpha", "more clients a round (clients.per-round)"
    assert tried({}) == f"more rounds, {alpha} or {more}."
    hub = "a model of the Hub in place of the embedded one (model.name)"
    embedded: Config = {"model.name": "embedded"}
    assert tried(embedded) == f"more rounds, {alpha}, {more} or {hub}."
    alike: Config = {"clients.partitioner": "iid", "clients.count": 5}
    assert tried(alike) == "more rounds."


def test_without_an_evaluation_nothing_is_said() -> None:
    figures = {"accuracy": None, "majority_accuracy": None}
    assert tell_chance(parse(SKEWED), figures) == ""


# Before the first round


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 21},
        {"clients.per-round": 6},
        {"clients.alpha": 0.11},
        {"clients.partitioner": "iid"},
        {"clients.count": 5},  # all in each round
        {"data.name": "stdlib-docs"},
    ],
)
def test_few_rounds_of_few_skewed_clients_are_warned_of(changes: Config) -> None:
    [warning] = foresee(parse(SKEWED))
    assert "20 rounds of 5 clients at clients.alpha 0.1: the product is 10" in warning
    assert "Try more rounds, a larger clients.alpha or more clients" in warning
    assert foresee(parse(SKEWED | changes)) == []


@pytest.mark.parametrize("data", ["news-category", "/srv/tickets", "node"])
def test_the_embedded_model_is_warned_of_on_other_text(data: str) -> None:
    config: Config = {"data.name": data, "clients.alpha": 9.0}
    if data == "node":
        config |= {"clients.count": 0, "clients.holdout": 0.2}
    [warning] = foresee(parse(config))
    assert warning.startswith("model.name is embedded")
    assert repr(data) in warning
    assert foresee(parse(config | {"model.name": "minilm"})) == []


def test_the_default_run_is_not_warned_of() -> None:
    assert foresee(parse({})) == []


class SentError(Exception):
    """A message was about to be sent."""


class SilentGrid(InlineGrid):
    """Sends nothing."""

    def push_messages(self, messages: object) -> list[str]:
        raise SentError


def test_language_models_have_no_majority_class(
    config: Config, causal: Config, caplog: pytest.LogCaptureFixture
) -> None:
    config |= causal | {"clients.per-round": 2, "clients.alpha": 0.1}
    assert foresee(parse(config))
    with caplog.at_level(logging.WARNING, "flwr"), pytest.raises(SentError):
        start(config, SilentGrid(config))
    assert not caplog.records


def test_warnings_come_before_any_message(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    config |= SKEWED | {n: config[n] for n in ("model.name", "data.name")}
    config |= {"clients.count": 6, "clients.partitioner": "dirichlet"}
    assert foresee(parse(config))
    with caplog.at_level(logging.WARNING, "flwr"), pytest.raises(SentError):
        start(config, SilentGrid(config))
    assert [r.getMessage() for r in caplog.records] == foresee(parse(config))
