"""Runs that are interrupted and resumed, and what they must have in common."""

import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, MessageType

from slora_flwr.client.process import make_process
from slora_flwr.runs.checkpoint import read_checkpoint
from slora_flwr.runs.checkpoint_files import list_checkpoints
from tests.support.grids import Grid
from tests.support.runs import (
    Config,
    differ,
    events,
    facts,
    final,
    ledger,
    start,
    summary,
)


class InterruptionError(Exception):
    """The interruption of a run."""


class StoppingGrid(Grid):
    """A grid that interrupts its run in a round, once the first node has trained."""

    def __init__(self, config: Config, last: int, nodes: int = 2) -> None:
        super().__init__(config, nodes)
        self._last = last

    def _answer(self, message: Message) -> Message:
        reply = super()._answer(message)
        if (
            message.metadata.message_type == MessageType.TRAIN
            and not reply.has_error()
            and self.asked[-1].server_round == self._last
        ):
            raise InterruptionError
        return reply


def resumed(config: Config) -> Config:
    """Return the config that resumes a run."""
    return config | {"run.resume": config["run.dir"]}


def stop(config: Config, last: int) -> Path:
    """Interrupt a run in its round `last`."""
    make_process.cache_clear()  # as in a new process
    with pytest.raises(InterruptionError):
        start(config, StoppingGrid(config, last))
    return Path(str(config["run.dir"]))


def go_on(config: Config, nodes: int = 2) -> Path:
    make_process.cache_clear()
    return start(resumed(config), Grid(config, nodes))


def without(figures: dict[str, Any], *others: str) -> dict[str, Any]:
    """Return figures without those that depend on the clock or on process state."""
    left_out = {"directory", "seconds", "took", "message_bytes", *others}
    left_out |= {"message_bytes_up", "message_bytes_down"}
    return {
        name: without(value) if isinstance(value, dict) else value
        for name, value in figures.items()
        if name not in left_out
    }


def files(directory: Path) -> dict[str, Any]:
    """Return the exported files."""
    found: dict[str, Any] = {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for folder in ("adapter", "model")
        for path in sorted((directory / folder).rglob("*"))
    }
    if written := found.get("adapter/adapter_config.json"):
        read = json.loads(written)
        # PEFT keeps modules in sets, whose order differs between processes.
        found["adapter/adapter_config.json"] = {
            name: sorted(value) if isinstance(value, list) else value
            for name, value in read.items()
        }
    return found


def assert_same(directory: Path, expected: Path) -> None:
    """Check that two run directories agree in all that is promised."""
    names = {path.name for path in (expected / "checkpoints").iterdir()}
    assert {path.name for path in (directory / "checkpoints").iterdir()} == names
    stems = {Path(name).stem for name in names}
    for name in {
        "last",
        "averaged",
        "averaged-base",
        "best",
        "base",
        "best-base",
    } & stems:
        assert facts(directory, name) == facts(expected, name)
        one, other = final(directory, name), final(expected, name)
        assert one.keys() == other.keys()
        assert not differ(one, other), name
    for path in list_checkpoints(expected):
        one = read_checkpoint(directory / "checkpoints" / path.name).tensors
        other = read_checkpoint(path).tensors
        assert [*one] == [*other]
        assert not differ(one, other), path.name
    for kind in ("round", "handoff"):
        found = [without(event) for event in events(directory, kind)]
        for event, other_event in zip(found, events(expected, kind), strict=True):
            for client in event.get("clients", {}):
                assert event["clients"][client]["loss"] > 0
            assert event == without(other_event)
    # Rows without clients are messages that were sent again.
    rows = [
        [without(row) for row in ledger(d) if row["clients"] != "0"]
        for d in (directory, expected)
    ]
    assert rows[0] == rows[1]
    assert without(summary(directory)) == without(summary(expected))
    assert files(directory) == files(expected) != {}
    assert events(directory, "failure") == []


def content(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }
