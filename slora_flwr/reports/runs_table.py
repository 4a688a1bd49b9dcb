"""The table of `slora runs`."""

import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from slora_flwr.common.text import printable
from slora_flwr.reports.figures import ACCURACY, headline_of
from slora_flwr.runs.reader import RunError, began, read_run

# Of a name such as 20260102-093000-slora-1234, the date and the time.
_SHORTEST = 15
_PERPLEXITY = "ppl "  # before a figure among accuracies


def runs_table(paths: Sequence[Path]) -> Table:
    """Return a table of runs that fits 80 columns.

    A run is named by a beginning of its directory's name that no other one has.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold")  # the one that makes room
    for heading in ("state", "method"):
        table.add_column(heading, no_wrap=True)
    table.add_column("data", no_wrap=True, overflow="ellipsis", max_width=12)
    names = [path.name for path in paths]
    rows = [(printable(_shorten(p.name, names)), *_describe(p)) for p in paths]
    has_others = any(cells[4].startswith(_PERPLEXITY) for cells in rows)
    for heading in ("result" if has_others else "accuracy", "MB", "age"):
        table.add_column(heading, no_wrap=True, justify="right")
    for cells in rows:
        table.add_row(*map(escape, cells))
    return table


def _describe(path: Path) -> list[str]:
    age = _age(time.time() - began(path))
    try:
        run = read_run(path)
    except RunError:
        return ["unreadable", "", "", "", "", age]
    sent = sum(run.total("payload", way) or 0 for way in ("up", "down"))
    figure = "-"
    head = headline_of(run.evaluated)
    value = run.evaluated[-1].metrics.get(head.metric) if run.evaluated else None
    if value is not None:
        figure = f"{'' if head is ACCURACY else _PERPLEXITY}{value:{head.form}}"
    data = printable(Path(str(run.config["data.name"])).name)
    left_nothing = run.has_ended_early and not run.can_resume
    state = "no checkpoint" if left_nothing else run.state
    return [state, printable(run.method), data, figure, f"{sent / 1e6:.1f}", age]


def _shorten(name: str, names: Sequence[str]) -> str:
    """Return the shortest beginning of a name, but not too short, that it has alone."""
    others = [other for other in names if other != name]
    shared = [
        sum(
            1
            for _ in takewhile(
                lambda pair: pair[0] == pair[1], zip(name, other, strict=False)
            )
        )
        for other in others
    ]
    return name[: max([_SHORTEST, *(count + 1 for count in shared)])]


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
