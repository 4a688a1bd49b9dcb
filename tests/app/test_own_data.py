"""Whole runs on nodes' own data."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file
from torch import Tensor

from slora_flwr.client.process import make_process
from slora_flwr.config import ConfigError
from slora_flwr.engines.inline import InlineGrid
from slora_flwr.server.run import run
from slora_flwr.tasks.classification import ClassifierEvaluation
from slora_flwr.wire.messages import write_evaluation
from tests.support.causal import save_language_model
from tests.support.own_data import (
    KINDS,
    NodesGrid,
    as_dialogues,
    make_own_data_config,
    nodes_of,
    texts,
    write,
)
from tests.support.runs import Config


@pytest.fixture
def config(tmp_path: Path, tiny_models: dict[str, Path]) -> Config:
    return make_own_data_config(tmp_path, tiny_models["bert"])


@pytest.fixture(params=["classification", "causal-lm"])
def either(
    config: Config,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Config:
    """The config of either task on the same files."""
    if request.param == "classification":
        return config
    torch.manual_seed(0)
    return as_dialogues(
        config, save_language_model("llama", tmp_path_factory.mktemp("llama"))
    )


def final(config: Config) -> dict[str, Tensor]:
    folder = Path(str(config["run.dir"])) / "checkpoints"
    return load_file(folder / "last.safetensors")


def events(config: Config, kind: str) -> list[dict[str, Any]]:
    lines = (Path(str(config["run.dir"])) / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_a_run_on_own_data(either: Config, tmp_path: Path) -> None:
    config = either
    grid = NodesGrid(config, nodes_of(tmp_path))
    summary = run(grid, config, run_id=1)
    has_labels = "task" not in config
    told = {
        e["name"]: (e["client"], e["examples"], e["skipped"])
        for e in events(config, "node")
    }
    assert told == {"a": (0, 40, {}), "b": (1, 30, {}), "c": (2, 50, {"no text": 1})}
    # 5 of 8, 5 of 6 and 10 held out, in fives; all that are online evaluate.
    assert 0 <= summary["accuracy"] <= 1
    # Each label is one token, and then the end.
    units = 20 if has_labels else 40
    known = summary["accuracy"] * units
    assert known == pytest.approx(round(known))
    for event in events(config, "round"):
        assert {c: f["examples"] for c, f in event["clients"].items()} == {
            "0": 35,
            "1": 25,
            "2": 40,
        }
    classes = Path(str(config["run.dir"])) / "adapter" / "classes.json"
    assert classes.exists() == has_labels
    if has_labels:
        assert json.loads(classes.read_text()) == KINDS


def test_no_text_leaves_a_node(either: Config, tmp_path: Path) -> None:
    grid = NodesGrid(either, nodes_of(tmp_path))
    run(grid, either, run_id=1)
    sent = b"".join(grid.replies)
    assert (b"apples" in sent) == ("task" not in either)
    # Two words: one could come up in the numbers by chance.
    assert not re.search(rb"w\d+ w\d+", sent)
    assert str(tmp_path).encode() not in sent


def test_a_node_whose_data_grew_is_asked_again(either: Config, tmp_path: Path) -> None:
    class GrowingGrid(NodesGrid):
        def _answer(self, message: Message) -> Message:
            if message.metadata.group_id == "2" and grown.is_file():
                write(grown, texts(0, 60, KINDS[:2]))
                make_process.cache_clear()
            return super()._answer(message)

    grown = tmp_path / "node-0.csv"
    config = either | {"rounds": 4}
    run(GrowingGrid(config, nodes_of(tmp_path)), config, run_id=1)
    [failure] = events(config, "failure")
    assert failure["round"] == 2
    assert "its weights are [50], not from 1 to [40]" in failure["reason"]
    last = events(config, "round")[-1]
    assert last["clients"]["0"]["examples"] == 50


def test_a_node_cannot_evaluate_on_more_than_it_has(
    config: Config, tmp_path: Path
) -> None:
    class BoastfulGrid(NodesGrid):
        def _answer(self, message: Message) -> Message:
            reply = super()._answer(message)
            facts = reply.metadata
            if (facts.message_type, facts.src_node_id) == ("evaluate", 1):
                counts = np.zeros((3, 3), dtype=np.int64)
                counts[:, 0] = 2**62
                reply.content = write_evaluation(ClassifierEvaluation(0.1, counts))
            return reply

    summary = run(BoastfulGrid(config, nodes_of(tmp_path)), config, run_id=1)
    reasons = {e["reason"] for e in events(config, "failure")}
    assert reasons == {f"it evaluates on {2**62} examples, and holds out 8"}
    assert summary["accuracy"] * 15 == pytest.approx(round(summary["accuracy"] * 15))


def test_server_side_test_data_and_simulated_nodes(
    either: Config, tmp_path: Path
) -> None:
    test = write(tmp_path / "test.csv", texts(3, 60, KINDS))
    config = either | {"data.test": str(test), "clients.holdout": 0.0}
    run(NodesGrid(config, nodes_of(tmp_path)), config, run_id=1)
    deployed = final(config)

    write(tmp_path / "node-1.csv", texts(1, 30, KINDS[1:]))
    config |= {"data.train": f"{tmp_path}/node-{{}}.csv", "run.dir": f"{tmp_path}/sim"}
    summary = run(InlineGrid(config, nodes=3), config, run_id=2)
    simulated = final(config)
    assert all(deployed[name].equal(simulated[name]) for name in deployed)
    known = summary["accuracy"] * (120 if "task" in config else 60)
    assert known == pytest.approx(round(known))


def test_given_labels_leave_others_out(config: Config, tmp_path: Path) -> None:
    config |= {"data.labels": "apples,bridges", "clients.min-examples": 20}
    run(NodesGrid(config, nodes_of(tmp_path)), config, run_id=1)
    [left] = events(config, "left_out")
    told = {e["name"]: e["skipped"] for e in events(config, "node")}
    assert left["name"].startswith("b (node")
    assert {name: s.get("unknown label", 0) for name, s in told.items()} == {
        "a": 0,
        "c": sum(kind == "clouds" for _, kind in texts(2, 50, KINDS)),
    }


def test_test_data_of_other_labels_is_an_error(config: Config, tmp_path: Path) -> None:
    test = write(tmp_path / "test.csv", texts(3, 60, KINDS))
    config |= {"data.test": str(test), "data.labels": "apples,bridges"}
    grid = NodesGrid(config, nodes_of(tmp_path))
    with pytest.raises(ConfigError, match=r"holds the labels clouds; allowed: those"):
        run(grid, config, run_id=1)
    assert grid.replies == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"data.labels": "apples,bridges"},
            r"data\.labels is .*; allowed: empty, since",
        ),
        ({"data.response": "answer"}, r"no column answer; its columns are text, label"),
    ],
)
def test_what_a_language_model_cannot_have_is_refused_before_any_message(
    config: Config, tmp_path: Path, changes: Config, told: str
) -> None:
    test = write(tmp_path / "test.csv", texts(3, 60, KINDS))
    model = save_language_model("llama", tmp_path / "llama")
    config = as_dialogues(config, model) | {"data.test": str(test)} | changes
    grid = NodesGrid(config, nodes_of(tmp_path))
    with pytest.raises(ConfigError, match=told):
        run(grid, config, run_id=1)
    assert grid.replies == []


def test_a_node_without_data_is_named_and_its_path_is_not(
    either: Config, tmp_path: Path
) -> None:
    config = either
    nodes = nodes_of(tmp_path) | {"b": tmp_path / "secret.csv"}
    grid = NodesGrid(config, nodes)
    run(grid, config, run_id=1)
    [left] = events(config, "left_out")
    assert "b: its data is of no use; its own log says why" in left["reason"]
    assert b"secret" not in b"".join(grid.replies)
    assert {c for e in events(config, "round") for c in e["clients"]} == {"0", "1"}
