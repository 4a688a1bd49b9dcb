"""Whole runs with privacy of each example: what is spent, what leaves, who refuses."""

import csv
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import Message, MessageType, RecordDict

from slora_flwr.client.spending import spent
from slora_flwr.config import ConfigError, parse
from slora_flwr.engines.inline import InlineGrid
from slora_flwr.privacy.accountant import Release
from slora_flwr.privacy.examples import ExamplePrivacy
from slora_flwr.reports.page import render
from slora_flwr.reports.run_page import report
from slora_flwr.runs.reader import read_run
from slora_flwr.server.strategy import TooFewRepliesError
from slora_flwr.training import trainer
from slora_flwr.wire.messages import Report
from tests.support.causal import save_language_model
from tests.support.grids import RecordingGrid
from tests.support.own_data import (
    KINDS,
    NodesGrid,
    as_dialogues,
    make_own_data_config,
    nodes_of,
    texts,
    write,
)
from tests.support.runs import Config, events, make_config, summary
from tests.support.runs import start as begin
from tests.support.secure import SECURE

PRIVATE: Config = {
    "privacy.unit": "example",
    "privacy.epsilon": 8.0,
    "privacy.clip-norm": 1.0,
    "privacy.delta": 0.01,
    "train.batch-size": 8,
}
METHODS = ("slora", "lora", "ffa-lora", "fedex-lora", "flexlora", "bitfit", "houlsby")


@pytest.fixture
def config(corpus: Path, tiny_models: dict[str, Path], tmp_path: Path) -> Config:
    return make_config(corpus, tiny_models["bert"], tmp_path / "run") | PRIVATE


@pytest.fixture
def own(tmp_path: Path, tiny_models: dict[str, Path]) -> Config:
    config = make_own_data_config(tmp_path, tiny_models["bert"]) | PRIVATE
    test = write(tmp_path / "test.csv", texts(9, 30, KINDS))
    config |= {"data.test": str(test), "data.labels": ",".join(KINDS)}
    return config | {"clients.holdout": 0.0}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_spends_its_epsilon(config: Config, method: str) -> None:
    """The last round reaches it: six clients have 21 or 22 examples each."""
    config |= {"method": method}
    directory = begin(config, InlineGrid(config))
    rounds = events(directory, "round")
    told = [event["epsilon"] for event in rounds]
    assert told == sorted(told)
    assert 7.99 < told[-1] <= 8.0
    assert not events(directory, "failure")
    found = summary(directory)["privacy"]
    assert found["unit"] == "example"
    assert (found["epsilon"], found["delta"]) == (told[-1], 0.01)
    # No figure of a client's training.
    assert all(event["clients"] == {} and event["replied"] == 6 for event in rounds)
    assert all(event.get("train_loss") is None for event in rounds)


def test_pages_and_cards_tell_the_unit(
    config: Config, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "flwr")
    directory = begin(config, InlineGrid(config))
    assert "for each example of the client that spends most" in caplog.text
    lines = [m for m in caplog.messages if m.startswith("round ")]
    assert all("epsilon" in line and "loss" not in line for line in lines)
    assert "for each example (8, 0.01)-differentially" in capsys.readouterr().out
    card = (directory / "adapter" / "README.md").read_text()
    assert "for each example (8, 0.01)-differentially private" in card
    page = report(read_run(directory))
    assert dict(page.figures)["epsilon, at delta 0.01"] == "8.00"
    assert render(page)


def test_what_a_reply_tells_is_no_figure_of_training(config: Config) -> None:
    grid = RecordingGrid(config)
    begin(config, grid)
    for told in grid.reports:
        assert told.losses == told.seconds == [0.0] * 6
        assert {*told.examples} <= {21, 22}
    assert not list((Path(str(config["run.dir"])) / "checkpoints").glob("round-*"))


@pytest.mark.parametrize("secure", [{}, SECURE])
def test_hospitals(own: Config, secure: Config, tmp_path: Path) -> None:
    """Rows of rare and unknown labels show in no description."""
    rows = [*texts(2, 50, KINDS), ("w9 w10", "rare"), ("w9", "apples")]
    write(tmp_path / "node-2.csv", rows)
    config = own | secure
    grid = NodesGrid(config, nodes_of(tmp_path))
    directory = begin(config, grid)
    joined = {e["name"]: e for e in events(directory, "node")}
    assert {name: e["examples"] for name, e in joined.items()} == {
        "a": 40,
        "b": 30,
        "c": 51,
    }
    assert all(not e["skipped"] and not e["unknown_labels"] for e in joined.values())
    assert not events(directory, "failure")
    assert 7.99 < summary(directory)["privacy"]["epsilon"] <= 8.0
    assert summary(directory)["accuracy"] is not None
    # No label, and no reason why a row was skipped, is in what nodes sent.
    for reply in grid.replies:
        assert not any(kind.encode() in reply for kind in (*KINDS, "rare", "no text"))
    # Each counts for itself.
    for context, examples in zip(grid._contexts.values(), (40, 30, 51), strict=True):
        privacy = ExamplePrivacy(parse(config), examples)
        (client,) = context.state.config_records["spent"]
        expected = [privacy.release(0), privacy.release(1, 2)]
        found = spent(context, int(client))
        assert sum(r.steps for r in found) == sum(r.steps for r in expected)
        assert found[0].rate == 8 / examples


def test_hospitals_of_a_language_model(own: Config, tmp_path: Path) -> None:
    own.pop("data.labels")
    model = save_language_model("llama", tmp_path / "llama")
    config = as_dialogues(own, model) | {"method": "lora", "rounds": 2}
    directory = begin(config, NodesGrid(config, nodes_of(tmp_path)))
    assert 7.99 < summary(directory)["privacy"]["epsilon"] <= 8.0
    assert not events(directory, "failure")


def test_nodes_that_tell_no_labels_need_some(own: Config, tmp_path: Path) -> None:
    config = own | {"data.labels": ""}
    with pytest.raises(ConfigError, match=r"data.labels is ''; allowed: two or more"):
        begin(config, NodesGrid(config, nodes_of(tmp_path)))


def test_a_rare_label_does_not_decide_over_other_rows(
    own: Config, tmp_path: Path
) -> None:
    """Four rows of a label are trained on, as five are; the fifth is one more."""
    sizes = []
    for count in (4, 5):
        rows = [("w80 w81", "clouds")] * count + texts(0, 40, KINDS[:2])
        write(tmp_path / "node-0.csv", rows)
        config = own | {"rounds": 2, "run.dir": str(tmp_path / f"run-{count}")}
        directory = begin(config, NodesGrid(config, nodes_of(tmp_path)))
        (node,) = (e for e in events(directory, "node") if e["name"] == "a")
        sizes.append(node["examples"])
    assert sizes == [44, 45]


class Losing(InlineGrid):
    """A grid that loses all replies of the first attempt at a round."""

    def __init__(self, config: Config, lost: int) -> None:
        super().__init__(config, 1)
        self.reasons: list[str] = []
        self._lost = lost

    def _answer(self, message: Message) -> Message:
        reply = super()._answer(message)
        if message.metadata.message_type == MessageType.TRAIN:
            if reply.has_error():
                self.reasons.append(str(reply.error.reason))
            elif Report.read(reply.content).server_round == self._lost:
                self._lost = 0
                reply.content = RecordDict()
        return reply


def test_a_round_that_is_repeated_is_spent_twice(config: Config) -> None:
    """So the last one would be beyond the budget, and the nodes refuse it."""
    config |= {"clients.min-replies": 6}
    grid = Losing(config, lost=2)
    with pytest.raises(TooFewRepliesError):
        begin(config, grid)
    directory = Path(str(config["run.dir"]))
    told = [event["epsilon"] for event in events(directory, "round")]
    assert len(told) == 2
    assert 7.99 < told[-1] <= 8.0
    assert len(grid.reasons) == 2
    assert (
        "client 0: it has spent its epsilon of 8: another training" in grid.reasons[0]
    )


def test_without_an_epsilon_a_round_is_repeated_and_counted(config: Config) -> None:
    noise: Config = {"privacy.epsilon": 0.0, "privacy.noise-multiplier": 1.0}
    config |= noise | {"clients.min-replies": 6, "method": "lora"}
    grid = Losing(config, lost=2)
    directory = begin(config, grid)
    (context,) = grid._contexts.values()
    found = {r for client in range(6) for r in spent(context, client)}
    assert found <= {Release(8 / n, 1.0, 3 * 4) for n in (21, 22)}
    most = ExamplePrivacy(parse(config), 21).epsilon({0: 4})
    assert summary(directory)["privacy"]["epsilon"] == most


def test_too_few_examples_for_a_delta_are_refused(own: Config, tmp_path: Path) -> None:
    """By the node itself, in a way that the server sees."""
    config = own | {"privacy.delta": 0.0, "clients.min-replies": 1}
    write(tmp_path / "node-2.csv", texts(2, 90, KINDS))
    directory = begin(config, NodesGrid(config, nodes_of(tmp_path)))
    failures = events(directory, "failure")
    assert len(failures) == 2 * 3
    told = "privacy.delta is 0.0173 for its 40 examples; allowed: up to 0.01"
    assert any(told in failure["reason"] for failure in failures)
    assert summary(directory)["privacy"]["delta"] == 90**-1.1


def crash(*_: object) -> None:
    raise RuntimeError("the text of patient 7")


def diverge(backbone: object, adapter: object, *_: object) -> None:
    with torch.no_grad():
        adapter.parameters()[0].fill_(float("nan"))  # type: ignore[attr-defined]


@pytest.mark.parametrize("train", [crash, diverge])
def test_failures_tell_nothing(
    config: Config, monkeypatch: pytest.MonkeyPatch, train: Callable[..., None]
) -> None:
    monkeypatch.setattr(trainer, "train_privately", train)
    with pytest.raises(TooFewRepliesError):
        begin(config, InlineGrid(config))
    failures = events(Path(str(config["run.dir"])), "failure")
    assert failures
    for failure in failures:
        assert "patient" not in failure["reason"]
        assert "it failed; its node's log says why" in failure["reason"]


def test_classes_of_shared_data_are_those_of_the_test_data(
    config: Config, corpus: Path, tmp_path: Path
) -> None:
    """A label that one client alone has does not show."""
    with corpus.open() as file:
        rows = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    train = write(tmp_path / "train.csv", [*rows, ("w9 w9", "secret")])
    test = write(tmp_path / "test.csv", rows[:20])
    config |= {"data.name": str(train), "data.test": str(test), "rounds": 2}
    directory = begin(config, InlineGrid(config))
    for path in directory.rglob("*"):
        assert not path.is_file() or b"secret" not in path.read_bytes(), path
