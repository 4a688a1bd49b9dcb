"""Charts as inline SVG, with selectable text."""

import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from textwrap import wrap
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

# Colours of Okabe and Ito with contrast to white; dashes distinguish them in grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#222222")
DASHES: tuple[tuple[float, tuple[float, ...]], ...] = (
    (0, ()),
    (0, (5, 2)),
    (0, (1.2, 1.8)),
    (0, (6, 2, 1.2, 2)),
)
MARKERS = "osD^vPX*<>hp"
GREY, INK, GRID, BOX = "#595959", "#1a1a1a", "#dddddd", "#cfe3f1"
# On a page each colour is a property of this name, so that it can be another one on a
# dark screen.
PALETTE = {
    light: (f"c{i}", dark)
    for i, (light, dark) in enumerate(
        {
            COLOURS[0]: "#56b4e9",
            COLOURS[1]: "#ff9147",
            COLOURS[2]: "#2cc79a",
            COLOURS[3]: "#e596d6",
            COLOURS[4]: "#f0e442",
            GREY: "#a8a8a8",
            INK: "#e6e6e6",
            GRID: "#3a3a3a",
            BOX: "#1d4a68",
        }.items()
    )
}
_MARKERS_IN_LINE = 8
_SPACE = 290  # points across a chart, for text

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "slora",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 11,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.markersize": 4,
    "figure.facecolor": "none",
}


@dataclass(frozen=True)
class Look:
    """The colour, dashes and marker that distinguish a line, also in grey."""

    colour: str
    dash: tuple[float, tuple[float, ...]]
    marker: str


@dataclass(frozen=True)
class Line:
    """A line through points; `low` and `high`, if given, bound a band around it."""

    label: str
    look: Look
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Chart:
    """A chart, drawn when its page is rendered.

    Attributes
    ----------
    caption : str
        What the chart shows.
    told : str
        Text alternative for readers who cannot see the chart.
    draw : Callable
        Draws the chart on empty axes.
    size : tuple[float, float]
        Size in inches; only its ratio to the text matters.
    """

    caption: str
    told: str
    draw: Callable[[Axes], None]
    size: tuple[float, float] = (4.6, 3.1)

    def svg(self, name: str) -> Markup:
        """Return an SVG element for an HTML document in which `name` is unique."""
        buffer = io.StringIO()
        with rc_context(_STYLE):
            figure = Figure(figsize=self.size, layout="constrained")
            self.draw(figure.subplots())
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(buffer, format="svg", metadata=nothing)
        return _embedded(buffer.getvalue(), name, self.told)


def looks(names: Iterable[str], kinds: Iterable[str]) -> dict[str, Look]:
    """Return a look per name; names of one kind share a colour.

    If there is one kind, or more kinds than colours, each name is a kind of its own.
    """
    pairs = list(zip(names, kinds, strict=True))
    distinct = list(dict.fromkeys(kind for _, kind in pairs))
    if not 1 < len(distinct) <= len(COLOURS):
        distinct = [name for name, _ in pairs]
        pairs = [(name, name) for name, _ in pairs]
    colours = dict(zip(distinct, cycle(COLOURS)))
    used = dict.fromkeys(COLOURS, 0)
    found = {}
    for (name, kind), marker in zip(pairs, cycle(MARKERS)):
        colour = colours[kind]
        found[name] = Look(colour, DASHES[used[colour] % len(DASHES)], marker)
        used[colour] += 1
    return found


def keys(found: dict[str, Look]) -> list[Chart]:
    """Return the key to looks: a sample of each line, with its name as the caption."""

    def sample(look: Look) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            axes.set_axis_off()
            axes.plot([0, 1, 2], [0, 0, 0], **_line(look), markevery=[1])

        return draw

    return [
        Chart(name, f"Line of {name}", sample(look), (0.5, 0.16))
        for name, look in found.items()
    ]


def line_chart(
    caption: str,
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    log: bool = False,
    whole: bool = False,
    ticks: Sequence[str] = (),
    boundaries: Sequence[tuple[float, str]] = (),
    level: float | None = None,
) -> Chart:
    """Return a chart of lines with their bands.

    Parameters
    ----------
    caption : str
        What the chart shows.
    lines : Sequence[Line]
        The lines, in the order of the key.
    x, y : str
        Labels of the axes.
    log : bool
        Use a logarithmic x axis if x spans a factor of ten.
    whole : bool
        True if x are whole numbers.
    ticks : Sequence[str]
        Names of x = 0, 1, …, if x are not numbers.
    boundaries : Sequence[tuple[float, str]]
        Vertical lines, each at an x and with the name of what begins there.
    level : float or None
        Height of a dotted horizontal line.
    """

    def draw(axes: Axes) -> None:
        for line in lines:
            every = max(1, -(-len(line.x) // _MARKERS_IN_LINE))
            axes.plot(
                line.x, line.y, **_line(line.look), markevery=every, label=line.label
            )
            if line.low:
                axes.fill_between(
                    line.x,
                    line.low,
                    line.high,
                    color=line.look.colour,
                    alpha=0.15,
                    linewidth=0,
                )
        axes.set(xlabel=x, ylabel=y)
        if log:
            _scale(axes)
        if ticks:
            axes.set_xticks(range(len(ticks)), [t.replace(" ", "\n") for t in ticks])
            axes.margins(x=0.1)
        if whole:
            axes.xaxis.set_major_locator(_whole_numbers())
        if level is not None:
            axes.axhline(level, color=GREY, linestyle=":", linewidth=1)
        top = axes.get_xaxis_transform()
        for at, begins in boundaries:
            axes.axvline(at, color=GREY, linewidth=1)
            # The label is above the plot, where no line can cross it.
            axes.text(at, 1.02, begins, transform=top, color=GREY, fontsize=9)

    ends = (f"{line.label}, from {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in lines)
    told = f"{caption} Lines of {y} against {x}: {'; '.join(ends)}."
    return Chart(caption, told, draw)


def bar_chart(
    caption: str,
    edges: Sequence[float],
    counts: Sequence[int],
    *,
    x: str,
    y: str,
) -> Chart:
    """Return a histogram."""

    def draw(axes: Axes) -> None:
        axes.stairs(counts, edges, fill=True, color=COLOURS[0], alpha=0.75)
        axes.stairs(counts, edges, color=COLOURS[0])
        axes.set(xlabel=x, ylabel=y)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(_whole_numbers())

    return Chart(caption, caption, draw)


def box_chart(
    caption: str, boxes: Sequence[tuple[str, Sequence[float]]], *, x: str
) -> Chart:
    """Return a chart of each label's minimum, quartiles and maximum, from the top."""
    wrapped = [(_wrapped(label), values) for label, values in boxes]
    # Labels are above their boxes, so that they take no width from them.
    lines = max(len(label) for label, _ in wrapped)
    pitch = 0.25 + 0.2 * lines  # inches from box to box

    def draw(axes: Axes) -> None:
        heights = range(len(boxes), 0, -1)
        beside = axes.get_yaxis_transform()
        half = 0.09 / pitch
        for height, (label, (low, first, median, third, high)) in zip(
            heights, wrapped, strict=True
        ):
            text = axes.text(
                0.01,
                height + 0.12 / pitch,
                "\n".join(label),
                transform=beside,
                va="bottom",
                linespacing=1.1,
            )
            text.set_in_layout(False)
            axes.plot([low, high], [height, height], color=COLOURS[0], linewidth=1)
            axes.barh(height, third - first, 2 * half, first, color=BOX)
            axes.plot([median] * 2, [height - half, height + half], color=INK)
        axes.set(xlabel=x, ylim=(0.5, len(boxes) + 1), yticks=[])

    told = (
        f"{label}, {', '.join(f'{v:.3g}' for v in values)}" for label, values in boxes
    )
    size = (Chart.size[0], 0.8 + pitch * len(boxes))
    return Chart(caption, f"{caption} {'; '.join(told)}.", draw, size)


def _wrapped(text: str) -> list[str]:
    """Return a text in lines that fit across a chart."""
    for width in range(len(text), 1, -1):
        lines = wrap(text, width)
        if all(_points(line) <= _SPACE for line in lines):
            return lines
    return [text]


def _points(line: str) -> float:
    with rc_context(_STYLE):
        return float(TextPath((0, 0), line, size=_STYLE["font.size"]).get_extents().x1)


def _embedded(svg: str, name: str, label: str) -> Markup:
    """Return an SVG file reduced to what a page needs."""
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    body = svg[svg.index("</style>") : svg.rindex("</svg>")]
    body = re.sub(r"</style>\s*</defs>", "", body)
    body = body.replace("xlink:href", "href")
    # Groups' ids are unused. The others are references, which must be unique on a page.
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    body = re.sub(r' (?:d|x|y|width|height|transform)="[^"]*"', _shortened, body)
    body = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", body)
    body = re.sub(r"\s*\n\s*", " ", body)
    body = re.sub(r' style="[^"]*"', _themed, body)
    head = Markup('<svg role="img" aria-label="{}" {}>').format(label, Markup(view[0]))
    return head + Markup(body + "</svg>")


def _scale(axes: Axes) -> None:
    low, high = axes.dataLim.intervalx
    if high < 10 * low:
        return
    axes.set_xscale("log")
    subs = (1, 2, 5) if high < 300 * low else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    # The default formatter writes powers in TeX.
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.12g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _whole_numbers() -> MaxNLocator:
    return MaxNLocator("auto", integer=True)


def _shortened(attribute: re.Match[str]) -> str:
    return re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", attribute[0])


def _themed(style: re.Match[str]) -> str:
    return re.sub(r"#[0-9a-f]{6}\b", _property, style[0])


def _property(colour: re.Match[str]) -> str:
    if colour[0] not in PALETTE:
        return colour[0]
    name, _ = PALETTE[colour[0]]
    return f"var(--{name},{colour[0]})"


def _line(look: Look) -> dict[str, Any]:
    return {
        "color": look.colour,
        "linestyle": look.dash,
        "marker": look.marker,
        "linewidth": 1.6,
    }
