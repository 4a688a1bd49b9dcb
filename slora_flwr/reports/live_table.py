"""A table at the foot of a terminal that shows how far a run is."""

from collections.abc import Iterator
from contextlib import contextmanager
from logging import LogRecord
from types import TracebackType
from typing import Self

from flwr.common.logger import console_handler
from rich import box
from rich.console import Console, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from slora_flwr.reports.progress import (
    Closed,
    Failed,
    Within,
    read_line,
)

# Closed rounds that are shown while the run goes on; at its end all are.
SHOWN = 8
# What a narrow terminal leaves out, the first one first.
_LEFT_OUT = ("MB", "loss", "phase", "failures", "clients", "left", "epsilon")


class LiveTable:
    """The rounds of a run, read from its log and shown below all that is printed.

    Parameters
    ----------
    console : Console
        A terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._closed: list[Closed] = []
        self._failures: list[int] = []  # of each closed round
        self._failing = 0  # of the round under way
        self._within: Within | None = None
        self._spinner = Spinner("dots")
        self._live: Live | None = None

    @classmethod
    def of_terminal(cls, *, stderr: bool = False) -> "LiveTable | None":
        """Return a table on stdout or stderr; None if that is no terminal."""
        console = Console(stderr=stderr)
        can_redraw = console.is_terminal and not console.is_dumb_terminal
        return cls(console) if can_redraw else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def hear(self, level: str, message: str) -> bool:
        """Take up a line of the log; return whether the table shows what it says.

        Parameters
        ----------
        level : str
            The line's level, such as INFO.
        message : str
            The line without it.
        """
        told = read_line(level, message)
        if isinstance(told, Failed):
            self._failing += 1
        elif isinstance(told, Within):
            self._within = told
            self._start()
        elif isinstance(told, Closed):
            self._closed.append(told)
            self._failures.append(self._failing)
            self._failing, self._within = 0, None
            self._start()
            if told.round == told.rounds:
                self.stop()
        # Why clients are left out has no place in a table.
        return isinstance(told, Within | Closed)

    def above(self, line: str) -> None:
        """Print a line, which may have colours, above the table."""
        self._console.print(Text.from_ansi(line), soft_wrap=True)

    @contextmanager
    def heed_log(self) -> Iterator[None]:
        """Take up what this process logs."""
        console_handler.addFilter(self._take)
        try:
            yield
        finally:
            console_handler.removeFilter(self._take)
            self.stop()

    def stop(self) -> None:
        """End the table: all closed rounds stay, as if they had been printed."""
        if self._live is None:
            return
        self._live.stop()
        self._live = None
        if self._closed:
            self._console.print(self._table(len(self._closed), under_way=False))
        self._closed, self._failures = [], []

    def _take(self, record: LogRecord) -> bool:
        """Return whether a record is left to the log's own handler."""
        if self.hear(record.levelname, record.getMessage()):
            return False
        if self._live is None:
            return True
        self.above(console_handler.format(record))
        return False

    def _start(self) -> None:
        if self._live is None:
            self._live = Live(
                console=self._console,
                get_renderable=self._foot,
                transient=True,
                # What goes to a file or pipe still does.
                redirect_stdout=not self._console.stderr,
            )
            self._live.start()

    def _foot(self) -> RenderableType:
        # With its heading and the log's last lines it must fit the terminal.
        return self._table(max(1, min(SHOWN, self._console.height - 8)))

    def _table(self, most: int, *, under_way: bool = True) -> Table:
        """Return the table of the last closed rounds and of the one under way."""
        first = max(0, len(self._closed) - most)
        rows: list[dict[str, RenderableType]] = [
            self._row(*pair)
            for pair in zip(self._closed[first:], self._failures[first:], strict=True)
        ]
        if under_way and (row := self._row_under_way()):
            rows.append(row)
        named = [done.metric for done in self._closed if done.has_value]
        metric = named[-1] if named else "accuracy"
        names = ["round", "phase", "clients", "loss", metric, "MB", "left"]
        names += ["epsilon", "failures"]
        names = [name for name in names if any(name in row for row in rows)]
        wide = self._console.options.update(max_width=10_000)
        for name in _LEFT_OUT:
            table = _lay_out(names, rows)
            if Measurement.get(self._console, wide, table).maximum <= wide.size.width:
                break
            names = [other for other in names if other != name]
        return _lay_out(names, rows)

    def _row(self, done: Closed, failures: int) -> dict[str, RenderableType]:
        row: dict[str, RenderableType] = {
            "round": f"{done.round}/{done.rounds}",
            "phase": done.phase,
            done.metric: done.value,
        }
        if done.epsilon is not None:
            # The rest depends on who was drawn.
            return row | {"epsilon": done.epsilon}
        return row | {
            "clients": done.clients or "",
            "loss": done.loss or "",
            "MB": done.megabytes or "",
            "left": done.left or "",
            "failures": str(failures),
        }

    def _row_under_way(self) -> dict[str, RenderableType]:
        if self._within is not None:
            return {
                "round": f"{self._within.round}/{self._within.rounds}",
                "phase": self._within.phase,
                "clients": f"{self._within.answered}/{self._within.cohort}",
                "failures": str(self._failing),
            }
        if not self._closed:
            return {}
        last = self._closed[-1]
        return {"round": f"{last.round + 1}/{last.rounds}", "phase": self._spinner}


def _lay_out(names: list[str], rows: list[dict[str, RenderableType]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in names:
        is_text = name == "phase"
        table.add_column(name, justify="left" if is_text else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row.get(name, "") for name in names))
    return table
