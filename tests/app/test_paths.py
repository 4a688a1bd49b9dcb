"""Names that come over the network never say where a file is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message, MessageType
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from typer.testing import CliRunner

from slora_flwr.cli import app
from slora_flwr.common.files import run_folder
from slora_flwr.engines.inline import InlineGrid
from slora_flwr.server.run import run
from slora_flwr.wire.messages import END
from tests.support.grids import Grid
from tests.support.own_data import NodesGrid, texts, write
from tests.support.runs import INT8, TOP, Config, events, make_config, start
from tests.support.tiny import CLASSES

CONFIG = "config"


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home and a working directory deep enough for names that lead upwards."""
    monkeypatch.setenv("SLORA_HOME", str(tmp_path / "a" / "b" / "c" / "home"))
    working = tmp_path / "a" / "b" / "c" / "working"
    working.mkdir(parents=True)
    monkeypatch.chdir(working)


def tree(folder: Path) -> dict[Path, bytes]:
    """Return all that is below a folder, with what files hold."""
    return {p: p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


# From a server to a node


class KeepingGrid(Grid):
    """Keeps the last instruction of each kind as it went over the wire."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.kept: dict[str, bytes] = {}
        self.at_end: Callable[[], object] = lambda: None

    def _answer(self, message: Message) -> Message:
        kind = message.metadata.message_type
        if kind == END:
            self.at_end()
        self.kept[kind] = message_to_proto(message).SerializeToString()
        return super()._answer(message)

    def ask(self, kind: str, change: Callable[[Message], object]) -> Message:
        """Ask the node as before, but for what `change` does to the message."""
        message = message_from_proto(ProtoMessage.FromString(self.kept[kind]))
        change(message)
        return InlineGrid._answer(self, message)


@pytest.fixture
def grid(corpus: Path, tiny_models: dict[str, Path], tmp_path: Path) -> KeepingGrid:
    """A node that is in the low-rank phase, on a base that it keeps in a file."""
    config = make_config(corpus, tiny_models["bert"], tmp_path / "run")
    config |= INT8 | TOP | {"method": "slora", "rounds": 2, "clients.holdout": 0.2}
    config |= {"download.lossless": True}
    grid = KeepingGrid(config)
    kept, aside = run_folder(grid.run.run_id), tmp_path / "aside"
    grid.at_end = lambda: shutil.copytree(kept, aside)
    start(config, grid)
    shutil.move(aside, kept)  # as if the run went on
    return grid


def hostile(tmp_path: Path) -> list[str]:
    return [
        "../../x",
        "../../../../x",
        str(tmp_path / "x"),
        "a\0b",
        "9" * 300,
        "9" * 100_000,
        "x/y",
        "",
        "-1",
    ]


# What may become a part of a path must be digits; of the rest nothing does.
NUMBERS = ("server-round", "phase", "phase-round", "version", "moves", "lineage")
LISTS = ("clients", "residuals")
DIGESTS = ("base", "known", "since")


@pytest.mark.parametrize("kind", [MessageType.TRAIN, MessageType.EVALUATE])
def test_a_hostile_server_reaches_no_file_of_a_node(
    grid: KeepingGrid, tmp_path: Path, kind: str
) -> None:
    assert not grid.ask(kind, lambda message: None).has_error()
    before = tree(tmp_path)
    for name in (*NUMBERS, *LISTS, *DIGESTS):
        for value in (*hostile(tmp_path), 1.5, b"x"):
            if name in DIGESTS and value == "":
                continue  # means none

            def change(message: Message, name: str = name, value: Any = value) -> None:
                config = message.content.config_records[CONFIG]
                config[name] = [value] if name in LISTS else value

            reply = grid.ask(kind, change)
            assert reply.has_error(), (name, str(value)[:20])
            reason = str(reply.error.reason)
            assert "the instruction's records are off: " in reason, (name, reason)
            assert len(reason) < 600
            assert reason.isprintable()
    assert tree(tmp_path) == before


def test_names_that_are_only_compared(grid: KeepingGrid, tmp_path: Path) -> None:
    before = tree(tmp_path)
    for value in hostile(tmp_path):
        for name in ("fingerprint", "classes"):

            def change(message: Message, name: str = name, value: str = value) -> None:
                config = message.content.config_records[CONFIG]
                config[name] = [value] * len(CLASSES) if name == "classes" else value

            assert grid.ask(MessageType.TRAIN, change).has_error(), (name, value[:20])
    assert tree(tmp_path) == before


def test_a_checkpoint_cannot_name_the_folder_that_is_deleted() -> None:
    for value in ("1/../../x", "/x", "1"):
        with pytest.raises(ValueError, match="format code 'd'"):
            run_folder(value)  # type: ignore[arg-type]


# From a node to the server


def test_hostile_nodes_reach_no_file_of_a_server(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Names of nodes, labels and errors are told, written down and shown."""
    names = ["../../x", str(tmp_path / "x"), "a\0b", "n" * 300, "fails"]
    labels = ["../../y", str(tmp_path / "y"), "c\0d", "l" * 200]
    nodes = {}
    for i, name in enumerate(names):
        rows = texts(i, 40, CLASSES[:2])
        rows = [(text, labels[j % len(labels)]) for j, (text, _) in enumerate(rows)]
        nodes[name] = write(tmp_path / f"node-{i}.jsonl", rows)
    config: Config = {
        "method": "slora",
        "rounds": 2,
        "sparse.rounds": 1,
        "sparse.density": 0.05,
        "lora.rank": 4,
        "model.name": str(tiny_models["bert"]),
        "data.name": "node",
        "data.max-length": 12,
        "clients.count": 0,
        "clients.per-round": 5,
        "clients.min-nodes": 5,
        "clients.holdout": 0.2,
        "run.dir": str(tmp_path / "runs" / "run"),
    }

    class FailingGrid(NodesGrid):
        def _answer(self, message: Message) -> Message:
            kind = message.metadata.message_type
            if kind == MessageType.TRAIN and message.metadata.dst_node_id == 5:
                reason = f"../../z{tmp_path / 'z'}\0"
                return Message(Error(0, reason), reply_to=message)
            return super()._answer(message)

    before = tree(tmp_path)
    run(FailingGrid(config, nodes), config, 1)
    directory = Path(str(config["run.dir"]))
    out = tmp_path / "runs" / "out"
    for arguments in (["report"], ["compare", "--out", str(out)]):
        done = CliRunner().invoke(app, [*arguments, str(directory)])
        assert done.exit_code == 0, done.output
    told = {event["name"] for event in events(directory, "node")}
    assert {"../../x", str(tmp_path / "x"), r"a\x00b", "fails"} < told
    classes = json.loads((directory / "adapter" / "classes.json").read_text())
    assert classes == sorted(label.replace("\0", "") for label in labels)
    [first, *_] = events(directory, "failure")
    assert first["reason"].startswith("error 0: ../../z")
    home = tmp_path / "a" / "b" / "c" / "home"
    after = tree(tmp_path)
    assert {path: after[path] for path in before} == before
    for path in after.keys() - before.keys():
        assert any(p in (home, directory.parent) for p in (path, *path.parents)), path
