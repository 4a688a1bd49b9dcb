"""Pages of sections, and their tables as HTML, CSV and LaTeX."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import slora_embedded
from slora_flwr.common.files import write_atomically
from slora_flwr.common.text import csv_cell
from slora_flwr.reports.charts import PALETTE, Chart

LISTED = 500  # most rows of a table that grows with clients, classes or failures
Cell = str | int | float | None
NOTHING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes
    ----------
    heading : str
        Heading on the page and in LaTeX.
    name : str
        Heading in CSV, where numbers have more digits.
    spec : str
        Format of numbers on the page and in LaTeX; empty for a column of text.
    """

    heading: str
    name: str
    spec: str = ""


@dataclass(frozen=True)
class Table:
    """A table; a cell without a value is None.

    Attributes
    ----------
    name : str
        Stem of the table's files.
    caption : str
        What the table shows and how it was computed.
    columns : list[Column]
        The columns, of which the first names the row.
    rows : list of sequences of str, float or None
        The rows, with one cell per column.
    folded : bool
        True if the page shows the table only on request.
    shaded : bool
        True if the page shades numbers by their share of the row's sum.
    links : sequence of str or None
        Of each row, the address that its name leads to on the page; empty without any.
    """

    name: str
    caption: str
    columns: list[Column]
    rows: Sequence[Sequence[Cell]]
    folded: bool = False
    shaded: bool = False
    links: Sequence[str | None] = ()

    @property
    def written(self) -> list[list[str]]:
        """The cells as formatted text."""
        return [
            [
                _write(cell, column.spec)
                for cell, column in zip(row, self.columns, strict=True)
            ]
            for row in self.rows
        ]

    @property
    def shades(self) -> list[list[float]]:
        """The shade of each cell, from 0 to 1."""
        shades = []
        for row in self.rows:
            counts = [cell if isinstance(cell, int | float) else 0 for cell in row]
            whole = sum(counts) if self.shaded else 0
            shades.append([n / whole if whole else 0.0 for n in counts])
        return shades


@dataclass(frozen=True)
class Section:
    """A heading, followed by text, charts under their key, and tables."""

    title: str
    text: Sequence[str] = ()
    keys: Sequence[Chart] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Page:
    """A page: its title, sections, and headline figures as names and values.

    `notice` is what a reader must know before anything else. `data` holds the data of
    the charts, which is too long for the page.
    """

    title: str
    subtitle: str
    sections: Sequence[Section]
    figures: Sequence[tuple[str, str]] = ()
    notice: str = ""
    data: Sequence[Table] = ()


def render(page: Page) -> str:
    """Return a page as one HTML document that loads nothing."""
    return _render("page.html", page=page)


def render_body(page: Page) -> str:
    """Return what is in the body of a page."""
    return _render("body.html", page=page)


def render_watch() -> str:
    """Return the page that follows a run, for a server that has its script too."""
    return _render("watch.html")


def watch_script() -> str:
    """Return the script of the page that follows a run."""
    return (slora_embedded.templates() / "watch.js").read_text(encoding="utf-8")


def _render(name: str, **values: object) -> str:
    environment = Environment(
        # Of a package of its own, since an app bundle of Flower holds code alone.
        loader=FileSystemLoader(slora_embedded.templates()),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    palette = dict(PALETTE.values())
    return environment.get_template(name).render(palette=palette, **values)


def write(page: Page, folder: Path, name: str) -> Path:
    """Write a page as HTML, its tables as CSV and LaTeX, and its data as CSV.

    Parameters
    ----------
    page : Page
        The page.
    folder : Path
        Destination; created if missing.
    name : str
        Stem of the page's file, and prefix of the tables' files.

    Returns
    -------
    Path
        Path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables = [table for section in page.sections for table in section.tables]
    for table in [*page.data, *tables]:
        write_csv(table, folder / f"{name}-{table.name}.csv")
    for table in tables:
        write_latex(table, folder / f"{name}-{table.name}.tex")
    path = folder / f"{name}.html"
    write_page(page, path)
    return path


def write_page(page: Page, path: Path) -> None:
    """Write a page as HTML."""
    _write_file(path, render(page))


def write_csv(table: Table, path: Path) -> None:
    """Write a table as CSV.

    Numbers have six significant digits, missing cells are empty, and no cell is a
    formula to a spreadsheet.
    """
    file = StringIO(newline="")
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(column.name for column in table.columns)
    for row in table.rows:
        rows.writerow(
            f"{cell:.6g}" if isinstance(cell, float) else csv_cell(cell) for cell in row
        )
    _write_file(path, file.getvalue())


def write_latex(table: Table, path: Path) -> None:
    """Write a table as a booktabs tabular."""
    alignment = "".join("r" if column.spec else "l" for column in table.columns)
    heading = [column.heading for column in table.columns]
    body = "\n".join(map(_latex_row, table.written))
    lines = (
        "% needs \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{{alignment}}}",
        "\\toprule",
        _latex_row(heading),
        "\\midrule",
        body,
        "\\bottomrule",
        "\\end{tabular}",
    )
    _write_file(path, "\n".join(lines) + "\n")


def _write_file(path: Path, text: str) -> None:
    """Write a file whose mode follows the umask."""
    write_atomically(path, text.encode(), mode=0o666)


_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {
        "\\": "\\textbackslash{}",
        "~": "\\textasciitilde{}",
        "^": "\\textasciicircum{}",
        "<": "\\textless{}",
        ">": "\\textgreater{}",
        "±": "$\\pm$",
        MINUS: "$-$",
        NOTHING: "--",
        "…": "\\dots{}",
        "\n": " ",
    }
)


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(cell.translate(_LATEX) for cell in cells) + " \\\\"


def _write(cell: Cell, spec: str) -> str:
    if cell is None:
        return NOTHING
    return cell if isinstance(cell, str) else format(cell, spec).replace("-", MINUS)
