"""The table at the foot of a terminal, and the lines of the log that it reads."""

import io
import re
from collections.abc import Iterator
from logging import INFO, WARNING
from typing import Any

import pytest
from flwr.common.logger import console_handler, log
from rich.console import Console

from slora_flwr.reports.live_table import LiveTable
from slora_flwr.reports.progress import (
    Closed,
    CohortProgress,
    Failed,
    Within,
    progress_line,
    read_line,
)
from slora_flwr.runs.events import RecordedRound
from tests.support.clock import Clock
from tests.support.processes import wait_until

HEADINGS = ["round", "phase", "clients", "loss", "accuracy", "MB", "left", "failures"]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def closed(number: int, **changes: object) -> RecordedRound:
    facts: dict[str, Any] = {
        "seconds": 10.0 * number,
        "phase": "sparse",
        "cohort": [0, 1, 7],
        "clients": {},
        "round": number,
        "replied": 2,
        "train_loss": 0.8125,
        "payload_bytes": 1_230_000,
        "metrics": {"accuracy": 0.5},
    }
    return RecordedRound(**facts | changes)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    shown = io.StringIO()
    monkeypatch.setattr(console_handler, "stream", shown)
    return shown


def table_of(shown: io.StringIO, width: int = 80, height: int = 24) -> LiveTable:
    console = Console(file=shown, force_terminal=True, width=width, height=height)
    return LiveTable(console)


def final(shown: io.StringIO) -> list[list[str]]:
    """Return the cells of the table that stays when it ends."""
    _, _, text = ESCAPE.sub("", shown.getvalue()).rpartition(" round  ")
    heading, _, *rows = text.splitlines()
    return [["round", *heading.split()], *(row.split() for row in rows if row.strip())]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"metric": "accuracy", "value": "50.0%"}),
        ({"metrics": {"accuracy": 1.0}}, {"value": "100.0%"}),
        ({"metrics": {}}, {"metric": "accuracy", "value": "-", "has_value": False}),
        ({"metrics": {"perplexity": 12.5}}, {"metric": "perplexity", "value": "12.50"}),
        ({"metrics": {"exact_match": 0.5}}, {"metric": "exact match"}),
        (
            {"epsilon": 1.5, "train_loss": None},
            {"epsilon": "1.50", "clients": None, "loss": None, "left": None},
        ),
    ],
)
def test_a_progress_line_is_read_as_it_was_written(
    changes: dict[str, object], expected: dict[str, object]
) -> None:
    found = read_line("INFO", progress_line(120, closed(9, **changes)))
    assert isinstance(found, Closed)
    assert (found.round, found.rounds, found.phase) == (9, 120, "sparse")
    for name, value in expected.items():
        assert getattr(found, name) == value
    if "epsilon" not in changes:
        # By hand: 9 rounds in 90 s leave 111 of 10 s each.
        assert (found.clients, found.loss) == ("2/3", "0.812")
        assert (found.megabytes, found.left) == ("1.23", "18:30")


def test_other_lines_are_no_progress() -> None:
    within = "round 1/2 lora: 2 of 9 clients answered after 0:10"
    left_out = "a (node 5), clients [1, 2] left out: its reply is of round 3"
    assert read_line("INFO", within) == Within(1, 2, "lora", 2, 9)
    assert read_line("WARNING", left_out) == Failed()
    assert read_line("WARNING", "a (node 5) is left out: it is of 0.1") == Failed()
    for level, line in (
        ("ERROR", within),
        ("(ClientAppActor pid=1) INFO", within),
        ("INFO", left_out),
        ("INFO", f"{within}, it said"),
        ("INFO", f"a says round {within}"),
        ("WARNING", "round 3 failed; trying once more"),
    ):
        assert read_line(level, line) is None


def test_the_log_is_above_and_failures_are_counted(shown: io.StringIO) -> None:

    def text() -> str:
        return ESCAPE.sub("", shown.getvalue())

    table = table_of(shown)
    clock = Clock()
    progress = CohortProgress(table, now=clock.monotonic)
    with table.heed_log():
        log(INFO, "before")
        with progress.follow("round 1/3 sparse", 3):
            progress.hear([0])  # at once, other than in the log
            wait_until(lambda: "1/3  sparse      1/3" in text())
            log(WARNING, "node 2, clients [7] left out: it is [red]late[/red]")
            progress.hear([1])
            wait_until(lambda: "1/3  sparse      2/3" in text())
        log(INFO, progress_line(3, closed(1)))
        log(INFO, progress_line(3, closed(2)))
        log(INFO, progress_line(3, closed(3)))
        log(INFO, "after")
    assert "answered" not in text()
    assert text().index("before") < text().index("1/3  sparse      1/3")
    assert text().index("[red]late[/red]\n") < text().index("1/3  sparse      2/3")
    # The table ends with the last round, before what follows in the log.
    assert text().endswith("after\n")
    head, *rows, _ = final(shown)
    assert head == HEADINGS
    assert rows == [
        ["1/3", "sparse", "2/3", "0.812", "50.0%", "1.23", "0:20", "1"],
        ["2/3", "sparse", "2/3", "0.812", "50.0%", "1.23", "0:10", "0"],
        ["3/3", "sparse", "2/3", "0.812", "50.0%", "1.23", "0:00", "0"],
    ]
    log(INFO, progress_line(3, closed(1)))  # nobody heeds the log any more
    assert shown.getvalue().endswith(progress_line(3, closed(1)) + "\n")


def test_privacy_shows_no_more_than_its_line(shown: io.StringIO) -> None:
    with table_of(shown) as table:
        table.hear("WARNING", "node 2, clients [7] left out: it is late")
        for number in (1, 2):
            table.hear("INFO", progress_line(2, closed(number, epsilon=0.5)))
    assert final(shown) == [
        ["round", "phase", "accuracy", "epsilon"],
        ["1/2", "sparse", "50.0%", "0.50"],
        ["2/2", "sparse", "50.0%", "0.50"],
    ]


@pytest.mark.parametrize("width", [24, 40, 60, 80, 200])
@pytest.mark.parametrize("height", [5, 24])
def test_it_fits_and_keeps_what_matters_most(
    shown: io.StringIO, width: int, height: int
) -> None:
    rounds = 1000
    with table_of(shown, width, height) as table:
        for number in range(1, 31):
            table.hear("INFO", progress_line(rounds, closed(number)))
        foot = table._console.render_lines(table._foot())
        assert len(foot) <= height or len(foot) == 6  # heading, a round and the next
    head, *rows = final(shown)
    assert head[0] == "round"
    assert "accuracy" in head
    # All rounds stay at the end, and no figure is cut.
    assert [row[0] for row in rows] == [f"{n}/{rounds}" for n in range(1, 31)]
    assert {row[head.index("accuracy")] for row in rows} == {"50.0%"}
    assert ("MB" in head) == (width >= 80)
    text = ESCAPE.sub("", shown.getvalue())
    assert max(map(len, re.split(r"[\r\n]", text))) <= width


def test_it_stays_within_a_terminal_that_is_made_narrower(shown: io.StringIO) -> None:
    with table_of(shown, 80) as table:
        table.hear("INFO", progress_line(2, closed(1)))
        table._console.width = 40
    assert "loss" not in final(shown)[0]


def test_what_interrupts_a_run_leaves_its_rounds(shown: io.StringIO) -> None:
    def rounds() -> Iterator[str]:
        yield progress_line(9, closed(1))
        raise KeyboardInterrupt

    def follow() -> None:
        with table_of(shown) as table:
            for line in rounds():
                table.hear("INFO", line)

    with pytest.raises(KeyboardInterrupt):
        follow()
    assert [row[0] for row in final(shown)[1:]] == ["1/9"]
    assert "\x1b[?25l" not in shown.getvalue().rpartition("\x1b[?25h")[2]


def test_where_nothing_can_be_drawn_there_are_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert LiveTable.of_terminal(stderr=True) is None  # a file, as pytest has it
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "dumb")
    assert LiveTable.of_terminal() is None
    monkeypatch.setenv("TERM", "xterm")
    assert LiveTable.of_terminal() is not None
