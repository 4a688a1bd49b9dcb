"""Tables too wide for a terminal, divided by columns."""

from copy import copy
from dataclasses import replace

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table


def print_table(console: Console, table: Table, keys: int = 1) -> None:
    """Print a table, as several if it is too wide for the console.

    No heading or figure is cut. Names of rows take half of the width at most, and are
    folded if they are longer.

    Parameters
    ----------
    console : Console
        Where to print.
    table : Table
        The table.
    keys : int
        Number of columns, from the left, that say what a row is. Each table has them.
    """
    names, figures = table.columns[:keys], table.columns[keys:]
    for column in figures:
        column.no_wrap = True
    for column in names:
        column.overflow = "fold"
        column.max_width = max(6, console.width // (2 * keys))
    parts: list[list[Column]] = [[]]
    for column in figures:
        wider = [*names, *parts[-1], column]
        if parts[-1] and _width(console, table, wider) > console.width:
            parts.append([])
        parts[-1].append(column)
    if table.title:
        console.print(table.title, style="bold", markup=False, highlight=False)
    for part in parts:
        console.print(_select(table, [*names, *part]))
    if table.caption:
        console.print(table.caption, style="dim", markup=False, highlight=False)


def _width(console: Console, table: Table, columns: list[Column]) -> int:
    """Return how wide a table of some columns is if nothing in it is wrapped."""
    unbounded = console.options.update(max_width=100_000)
    return Measurement.get(console, unbounded, _select(table, columns)).maximum


def _select(table: Table, columns: list[Column]) -> Table:
    """Return a table of some of the columns, without title and caption."""
    part = copy(table)
    part.title = part.caption = None
    part.columns = [replace(column, _index=i) for i, column in enumerate(columns)]
    return part
