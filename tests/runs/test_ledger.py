"""The bytes of whole runs, by hand."""

import csv
from pathlib import Path

import pytest

from slora_flwr.runs.ledger import Entry, Ledger
from tests.support.grids import RecordingGrid
from tests.support.runs import (
    HEAD_VALUES,
    LORA_VALUES,
    SPARSE_VALUES,
    Config,
    events,
    ledger,
    payloads,
    start,
    summary,
)


@pytest.mark.parametrize(
    ("method", "phase", "size"),
    [
        ("sft", "sparse", 4 * (SPARSE_VALUES + HEAD_VALUES)),
        ("lora", "lora", 4 * (LORA_VALUES + HEAD_VALUES)),
        ("head", "head", 4 * HEAD_VALUES),
    ],
)
def test_payload_bytes_follow_from_shapes(
    config: Config, method: str, phase: str, size: int
) -> None:
    config |= {"method": method, "rounds": 2, "clients.per-round": 4}
    directory = start(config, RecordingGrid(config, nodes=3))
    assert payloads(directory) == [
        (number, phase, direction, 4, 4 * size)
        for number in (1, 2)
        for direction in ("down", "up")
    ]
    told = summary(directory)
    assert told["payload_bytes_up"] == told["payload_bytes_down"] == 2 * 4 * size
    assert told["phases"][phase]["payload_bytes_up"] == 2 * 4 * size


@pytest.mark.parametrize(
    ("base", "base_values", "nodes"),
    [
        ("residual", SPARSE_VALUES + LORA_VALUES, 1),
        ("residual", SPARSE_VALUES + LORA_VALUES, 3),
        ("warm-start", SPARSE_VALUES, 2),
        ("w0", 0, 2),
    ],
)
def test_the_base_is_counted_once_per_client(
    config: Config, base: str, base_values: int, nodes: int
) -> None:
    config |= {"method": "slora", "rounds": 4, "clients.per-round": 4}
    config |= {"lora.base": base, "download.base-dtype": "float32"}
    directory = start(config, RecordingGrid(config, nodes=nodes))
    cohorts = [set(event["cohort"]) for event in events(directory, "round")]
    seen: set[int] = set()
    sparse, lora = 4 * (SPARSE_VALUES + HEAD_VALUES), 4 * (LORA_VALUES + HEAD_VALUES)
    expected = [
        (1, "sparse", "down", 4, 4 * sparse),
        (1, "sparse", "up", 4, 4 * sparse),
    ]
    for number in (2, 3, 4):
        new = cohorts[number - 1] - seen
        seen |= new
        # A frame of 8 bytes around each of the base's two parts.
        down = 4 * lora + len(new) * (4 * base_values + 16 * bool(base_values))
        expected += [(number, "lora", "down", 4, down)]
        expected += [(number, "lora", "up", 4, 4 * lora)]
    assert payloads(directory) == expected
    assert 4 < len(seen) <= 6


def test_message_bytes_are_those_of_the_messages(two_phases: Config) -> None:
    grid = RecordingGrid(two_phases, nodes=3)
    directory = start(two_phases, grid)
    for row in ledger(directory):
        number, told = int(row["round"]), int(row["message_bytes"])
        if row["direction"] == "down":
            found = sum(
                size
                for i, size in zip(grid.asked, grid.asked_bytes, strict=True)
                if i.server_round == number
            )
            # The link adds an id to each of the three messages.
            assert 0 <= found - told <= 3 * 10
        else:
            updates = [r for r in grid.reports if r.server_round == number]
            least = sum(len(r.update.data) for r in updates)
            assert least < told < least + 3 * 1500


ENTRIES = [
    Entry(1, "sparse", "down", 5, 500, 510),
    Entry(1, "sparse", "up", 4, 400, 450),
    Entry(2, "lora", "down", 3, 30, 33),
    Entry(2, "lora", "up", 3, 20, 22),
]


def test_the_ledger_is_a_csv_file_as_it_grows(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.csv")
    for count, entry in enumerate(ENTRIES, start=1):
        ledger.add(entry)
        with (tmp_path / "ledger.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == count
    assert rows[1] == {
        "round": "1",
        "phase": "sparse",
        "direction": "up",
        "clients": "4",
        "payload_bytes": "400",
        "message_bytes": "450",
        "planned_payload_bytes": "",
        "wire_bytes": "",
    }


def test_the_ledger_sums_by_direction_unit_and_phase(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.csv")
    for entry in ENTRIES:
        ledger.add(entry)
    assert ledger.total("payload", "down") == 530
    assert ledger.total("payload", "up") == 420
    assert ledger.total("message", "up") == 472
    assert ledger.total("payload", "down", "lora") == 30
    assert ledger.total("message", "up", "sparse") == 450
    assert ledger.total("message", "up", "full") == 0
