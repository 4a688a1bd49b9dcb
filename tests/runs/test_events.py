"""The lines of events.jsonl: what is written, and what is read of it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from slora_flwr.runs.events import (
    ClassRecord,
    ClientRecord,
    ClientsFailed,
    Event,
    HandedOff,
    NodeJoined,
    NodeLeftOut,
    RecordedRound,
    Resumed,
    Stopped,
    read_events,
    to_line,
)

ROUND = RecordedRound(
    seconds=1.5,
    phase="lora",
    cohort=[0, 3],
    clients={3: ClientRecord(10, 0.5, 0.25)},
    round=2,
    replied=1,
    train_loss=0.5,
    payload_bytes=800,
    metrics={"client_loss": 2.0, "loss": 1.0, "accuracy": 0.75},
    kept_energy=0.9,
    epsilon=1.25,
)
# As they have always been written.
LINES: dict[str, Event] = {
    '{"event": "round", "seconds": 1.5, "phase": "lora", "cohort": [0, 3], '
    '"clients": {"3": {"examples": 10, "loss": 0.5, "seconds": 0.25}}, "round": 2, '
    '"replied": 1, "train_loss": 0.5, "payload_bytes": 800, "client_loss": 2.0, '
    '"loss": 1.0, "accuracy": 0.75, "kept_energy": 0.9, "epsilon": 1.25}\n': ROUND,
    '{"event": "round", "seconds": 0.0, "phase": "head", "cohort": [], "clients": {}, '
    '"round": 4, "replied": 0, "payload_bytes": 0, "classes": {"right": [1, 0], '
    '"predicted": [2, 0], "labels": [1, 1], "confused": [[1, 0, 1]]}}\n': RecordedRound(
        phase="head",
        cohort=[],
        clients={},
        round=4,
        replied=0,
        payload_bytes=0,
        classes=ClassRecord([1, 0], [2, 0], [1, 1], [(1, 0, 1)]),
    ),
    '{"event": "handoff", "seconds": 0.5, "base": "residual", '
    '"energies": {"a": 0.5}, "took": 0.1}\n': HandedOff(
        seconds=0.5, base="residual", energies={"a": 0.5}, took=0.1
    ),
    '{"event": "failure", "seconds": 0.0, "round": 1, "node": 4, "clients": [7], '
    '"reason": "no"}\n': ClientsFailed(round=1, node=4, clients=[7], reason="no"),
    '{"event": "left_out", "seconds": 0.0, "node": 4, "name": "node 4", '
    '"reason": "no"}\n': NodeLeftOut(node=4, name="node 4", reason="no"),
    '{"event": "node", "seconds": 0.0, "node": 4, "name": "a", "client": 0, '
    '"examples": 9, "skipped": {"no text": 1}, "unknown_labels": ["x"]}\n': NodeJoined(
        node=4,
        name="a",
        client=0,
        examples=9,
        skipped={"no text": 1},
        unknown_labels=["x"],
    ),
    '{"event": "resumed", "seconds": 0.0, "round": 3, "run": "8"}\n': Resumed(
        round=3, run="8"
    ),
    '{"event": "stopped", "seconds": 0.0, "reason": "KeyError: 1"}\n': Stopped(
        reason="KeyError: 1"
    ),
}


@pytest.mark.parametrize("line", LINES, ids=lambda line: LINES[line].kind)
def test_an_event_is_written_as_this_line_and_read_back(
    tmp_path: Path, line: str
) -> None:
    assert to_line(LINES[line]) == line
    path = tmp_path / "events.jsonl"
    path.write_text(line)
    assert read_events(path) == [LINES[line]]


def test_what_nobody_measured_is_not_in_the_line(tmp_path: Path) -> None:
    bare = RecordedRound(
        phase="head",
        cohort=[],
        clients={},
        round=1,
        replied=0,
        train_loss=0.5,
        payload_bytes=0,
    )
    path = tmp_path / "events.jsonl"
    path.write_text(to_line(bare))
    assert path.read_text().endswith('"train_loss": 0.5, "payload_bytes": 0}\n')
    assert read_events(path) == [bare]


def test_lines_of_other_versions_and_half_lines_are_read_as_far_as_they_are_known(
    tmp_path: Path,
) -> None:
    path = tmp_path / "events.jsonl"
    assert read_events(path) == []
    new = to_line(Stopped(reason="no")).replace("}", ', "new_fact": 1}')
    path.write_text('{"event": "new_kind", "seconds": 1}\n' + new + '{"event": "rou')
    assert read_events(path) == [Stopped(reason="no")]


def test_a_round_of_nobody_has_no_loss(tmp_path: Path) -> None:
    nobody = replace(ROUND, cohort=[], clients={}, replied=0, train_loss=None)
    line = to_line(nobody)
    assert "train_loss" not in json.loads(line)
    path = tmp_path / "events.jsonl"
    # An older version wrote what is not JSON.
    old = line.replace('"payload', '"train_loss": NaN, "loss": Infinity, "payload')
    old = old.replace(', "loss": 1.0', "")
    path.write_text(line + old)
    found, other = read_events(path)
    assert found == nobody
    metrics = {n: v for n, v in nobody.metrics.items() if n != "loss"}
    assert other == replace(nobody, metrics=metrics)
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_line(replace(nobody, train_loss=math.nan))


def test_a_line_that_lacks_a_fact_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "stopped", "seconds": 1}\n')
    with pytest.raises(ValueError, match="line 1: reason is missing"):
        read_events(path)
