"""The page that compares groups of runs."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from types import MappingProxyType
from urllib.parse import quote

import numpy as np

from slora_flwr.common.text import printable, shorten
from slora_flwr.config import RunConfig, flatten, refuse
from slora_flwr.reports.chance import tell_warned
from slora_flwr.reports.charts import (
    Chart,
    Line,
    Look,
    box_chart,
    keys,
    line_chart,
    looks,
)
from slora_flwr.reports.figures import ACCURACY, FORMS, Headline, headline_of
from slora_flwr.reports.groups import (
    Group,
    Point,
    curve,
    evenness,
    families,
    fft_beside,
    final,
    group_runs,
    last_mean,
    late_losses,
    over_runs,
    reached,
    rows_of_methods,
)
from slora_flwr.reports.page import NOTHING, Cell, Column, Page, Section, Table
from slora_flwr.reports.paired_table import paired
from slora_flwr.runs.reader import RecordedRun, by_layer

GROUP = Column("group", "group")
_UNAVERAGED = (0.0, (1.0, 1.0))  # dashes of what is not averaged


def compare(
    runs: Sequence[RecordedRun],
    rates: Sequence[float],
    target: float | None = None,
    names: Mapping[str, str] = MappingProxyType({}),
    left_out: Sequence[str] = (),
    folder: Path | None = None,
    last: int = ACCURACY.last,
) -> Page:
    """Return the page that compares groups of runs.

    Parameters
    ----------
    runs : Sequence[RecordedRun]
        The runs, at least one.
    rates : Sequence[float]
        Rates of the modelled times, in Mbit/s.
    target : float or None
        Accuracy or perplexity to reach; None for one near full fine-tuning's, if it
        was run.
    names : Mapping[str, str]
        Names of groups; see `group_runs`.
    left_out : Sequence[str]
        Sentences on runs that are not among `runs`, and why.
    folder : Path or None
        Where the page will be, for links to the reports of runs; None without links.
    last : int
        How many of a run's last evaluations make its steadier figure, their mean.

    Raises
    ------
    ConfigError
        If one of the names, or the target, is impossible.
    """
    # Tuning runs are evaluated on other data and comparable only with each other.
    tested = [run for run in runs if not run.config["data.validation"]] or list(runs)
    groups = group_runs(tested, names)
    heads = [headline_of(r.evaluated) for g in groups for r in g.runs if r.evaluated]
    head = replace(heads[0] if len({*heads}) == 1 else ACCURACY, last=last)
    if target is not None and target > 1 and not head.is_lower_better:
        raise refuse("--target", target, "a number from 0 up to 1")
    curves = {group.label: curve(group, rates, head) for group in groups}
    sections = [
        _results(groups, head),
        *_differences(groups),
        *_curves(groups, curves, rates, head),
        *_targets(groups, curves, rates, target, head),
        *_heterogeneity(groups, head),
        *paired(groups, head),
        *_energies(groups),
        *_spread(groups),
        *_failures(groups),
        _configs(groups, folder),
    ]
    notices = list(left_out)
    if len(tested) < len(runs):
        notices.append(
            f"{len(runs) - len(tested)} of the runs are left out, since they were "
            "evaluated on held-out training data (data.validation)."
        )
    if again := [name for group in groups for name in _repeated(group)]:
        notices.append(
            f"Runs that repeat a seed of their group: {', '.join(shorten(again))}. "
            "They say nothing of the spread over seeds."
        )
    ended = [(run.path.name, run.summary) for run in tested]
    warned = [name for name, told in ended if told is not None and told.warning]
    if warned:
        notices.append(tell_warned(warned, len(tested)))
    methods = ", ".join(dict.fromkeys(group.method for group in groups))
    return Page(
        title=f"Comparison of {methods}",
        subtitle=f"{len(tested)} runs in {len(groups)} groups, one per config",
        notice=" ".join(notices),
        sections=sections,
        data=[_points(curves, rates, head)],
    )


def _repeated(group: Group) -> list[str]:
    """Return the names of runs with the seed of one before them."""
    seeds = [run.config["seed"] for run in group.runs]
    return [
        printable(run.path.name)
        for place, run in enumerate(group.runs)
        if run.config["seed"] in seeds[:place]
    ]


def _results(groups: list[Group], head: Headline) -> Section:
    also = [
        name
        for name in FORMS
        if name not in (head.metric, "loss", "macro_f1")
        and (name != ACCURACY.metric or head.metric != ACCURACY.metric)
        and any(final(run, name) is not None for group in groups for run in group.runs)
    ]
    columns = [
        GROUP,
        Column("runs", "runs", "d"),
        Column("seeds", "seeds"),
        Column("rounds", "rounds", "d"),
        Column(head.axis, f"{head.metric}{head.percent}", head.spec),
        Column("± sd", f"{head.metric}_sd", head.spec),
        Column(
            f"last {head.last}{head.unit}", f"last_{head.last}{head.percent}", head.spec
        ),
        Column("± sd", f"last_{head.last}_sd", head.spec),
        *([] if head.is_lower_better else [Column("macro-F1", "macro_f1", ".3f")]),
        *(Column(FORMS[name][0], name, ".3f") for name in also),
        Column("MB up", "megabytes_up", ".2f"),
        Column("MB down", "megabytes_down", ".2f"),
        Column("seconds", "seconds", ".0f"),
    ]

    has_wire = any(
        line.wire_bytes is not None
        for group in groups
        for run in group.runs
        for line in run.ledger
    )
    if has_wire:
        columns[-1:-1] = [
            Column("wire MB up", "wire_megabytes_up", ".2f"),
            Column("wire MB down", "wire_megabytes_down", ".2f"),
        ]

    def wire(group: Group) -> list[Cell]:
        sizes = [
            over_runs(group, lambda run: run.total("wire", way))  # noqa: B023
            for way in ("up", "down")
        ]
        return [fmean(known) / 1e6 if known else None for known in sizes]

    def row(group: Group) -> list[Cell]:
        value = over_runs(group, lambda run: final(run, head.metric))
        steady = over_runs(group, lambda run: last_mean(run, head))
        others = [*([] if head.is_lower_better else ["macro_f1"]), *also]
        up, down = (
            fmean((run.total("payload", direction) or 0) / 1e6 for run in group.runs)
            for direction in ("up", "down")
        )
        return [
            group.label,
            len(group.runs),
            ", ".join(str(run.config["seed"]) for run in group.runs),
            max(len(run.rounds) for run in group.runs),
            *(_scaled(_mean(value), head), _scaled(_deviation(value), head)),
            *(_scaled(_mean(steady), head), _scaled(_deviation(steady), head)),
            *(_mean(over_runs(group, partial(final, metric=n))) for n in others),
            *(up, down),
            *(wire(group) if has_wire else []),
            _mean(over_runs(group, _seconds)),
        ]

    told = "Accuracy and macro-F1 are"
    if head.metric != ACCURACY.metric:
        told = f"{head.name.capitalize()} and what follows it are"
    caption = (
        f"Means over runs with standard deviations (n - 1). {told} those of the last "
        f"evaluation; last {head.last} is the mean {head.name} of a run's last "
        f"{head.last} evaluations, which is steadier if clients differ so much that "
        f"one cohort can change {head.name} by "
        f"{'points' if head.scale > 1 else 'much'}. MB of tensors count each client as "
        "if it were a separate node. Seconds are as measured."
    )
    rows = [row(group) for group in groups]
    return Section("Results", tables=[Table("results", caption, columns, rows)])


def _differences(groups: list[Group]) -> list[Section]:
    """Return a table of what groups are if the label of one does not say."""
    if all(group.is_told for group in groups):
        return []
    keys = list(dict.fromkeys(key for group in groups for key in group.differences))
    columns = [GROUP, *(Column(key, key) for key in keys)]
    rows: list[list[Cell]] = []
    for group in groups:
        told = group.config | group.differences
        cells = [str(told[key]) if key in told else None for key in keys]
        rows.append([group.label, *cells])
    caption = f"What distinguishes the groups; {NOTHING}: a key that the method lacks."
    return [Section("Groups", tables=[Table("groups", caption, columns, rows)])]


def _seconds(run: RecordedRun) -> float | None:
    if run.summary is not None:
        return run.summary.seconds
    return run.rounds[-1].seconds if run.rounds else None


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _deviation(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def _scaled(value: float | None, head: Headline) -> float | None:
    return None if value is None else head.scale * value


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _model(rates: Sequence[float]) -> str:
    told = ", ".join(f"{rate:g}" for rate in rates)
    return (
        f"Modelled seconds, at {told} Mbit/s: the duration of a round is the recorded "
        "training time of its slowest client plus the time to receive and send a "
        "payload of the round's mean size at that rate. Each client is a separate "
        "machine. The server's work, latency and deadlines are not included."
    )


def _curves(
    groups: list[Group],
    curves: dict[str, list[Point]],
    rates: Sequence[float],
    head: Headline,
) -> list[Section]:
    """Return sections of mean curves, one per heterogeneity."""
    panels: dict[str, list[Group]] = {}
    drawn = [group for group in groups if curves[group.label]]
    for group in drawn:
        panels.setdefault(group.heterogeneity, []).append(group)
    if all(len({g.method for g in panel}) == 1 for panel in panels.values()):
        # With one method per panel, all heterogeneities can share one panel.
        panels = {"": drawn} if drawn else {}
    axes: dict[str, Callable[[Point], float]] = {
        "round": lambda point: point.round,
        "MB of tensors, both directions": lambda point: point.megabytes,
    }
    for i, rate in enumerate(rates):
        axes[f"modelled seconds at {rate:g} Mbit/s"] = _seconds_at(i)

    # Of the last state, where runs evaluated it beside the averaged one.
    unaveraged = replace(head, metric=f"plain_{head.metric}")
    plain = {group.label: curve(group, rates, unaveraged) for group in drawn}

    def charts(panel: list[Group], found: dict[str, Look]) -> list[Chart]:
        made, scale = [], head.scale
        for x, at in axes.items():
            lines = []
            for group in panel:
                points = curves[group.label]
                several = len(group.runs) > 1
                lines.append(
                    Line(
                        group.label,
                        found[group.label],
                        [at(point) for point in points],
                        [scale * point.accuracy for point in points],
                        [scale * min(p.accuracies) for p in points] if several else (),
                        [scale * max(p.accuracies) for p in points] if several else (),
                    )
                )
                if points := plain[group.label]:
                    label = _unaveraged(group)
                    y = [scale * point.accuracy for point in points]
                    places = [at(point) for point in points]
                    lines.append(Line(label, found[label], places, y))
            made.append(
                line_chart(
                    f"{head.name.capitalize()} against {x}.",
                    lines,
                    x=x,
                    y=head.axis,
                    log=x != "round",
                    whole=x == "round",
                )
            )
        return made

    sections: list[Section] = []
    text = (
        "Mean over seeds at each evaluation that all of them have; the band spans the "
        f"minimum to the maximum. {_model(rates)}"
    )
    for name, panel in panels.items():
        found = looks([g.label for g in panel], [g.method for g in panel])
        for group in panel:
            if plain[group.label]:
                look = replace(found[group.label], dash=_UNAVERAGED)
                found[_unaveraged(group)] = look
        sections.append(
            Section(
                f"Curves, {name}" if len(panels) > 1 else "Curves",
                () if sections else [text],
                keys(found),
                charts(panel, found),
            )
        )
    return sections


def _unaveraged(group: Group) -> str:
    return f"{group.label}, last state, not averaged"


def _points(
    curves: dict[str, list[Point]], rates: Sequence[float], head: Headline
) -> Table:
    columns = [
        GROUP,
        Column("round", "round", "d"),
        Column("phase", "phase"),
        *(
            Column(f"{name}{head.unit}", f"{name}{head.percent}", head.spec)
            for name in ("mean", "minimum", "maximum")
        ),
        Column("MB", "megabytes", ".2f"),
        *_columns_of(rates),
    ]
    rows: list[list[Cell]] = [
        [
            label,
            point.round,
            point.phase,
            head.scale * point.accuracy,
            head.scale * min(point.accuracies),
            head.scale * max(point.accuracies),
            point.megabytes,
            *point.seconds,
        ]
        for label, points in curves.items()
        for point in points
    ]
    return Table("curves", "Mean curves.", columns, rows)


def _columns_of(rates: Sequence[float]) -> list[Column]:
    return [
        Column(f"s at {rate:g} Mbit/s", f"seconds_at_{rate:g}", ".1f") for rate in rates
    ]


def _seconds_at(index: int) -> Callable[[Point], float]:
    return lambda point: point.seconds[index]


def _targets(
    groups: list[Group],
    curves: dict[str, list[Point]],
    rates: Sequence[float],
    given: float | None,
    head: Headline,
) -> list[Section]:
    rows: list[list[Cell]] = []
    for group in groups:
        target = given
        fft = fft_beside(group, groups, head)
        if target is None and fft is not None:
            target = head.nearly(_level(fft, head))
        if target is None:
            continue
        point = reached(curves[group.label], target, head)
        at: list[Cell] = [None] * (2 + len(rates))
        if point is not None:
            at = [point.round, point.megabytes, *point.seconds]
        rows.append([group.label, head.scale * target, *at])
    if not rows:
        return []
    columns = [
        GROUP,
        Column(f"target{head.unit}", f"target{head.percent}", head.spec),
        Column("round", "round", "d"),
        Column("MB", "megabytes", ".2f"),
        *_columns_of(rates),
    ]
    origin = "the one given"
    if given is None:
        origin = (
            f"{head.margin} the mean of fft's last {head.last} evaluations "
            "in the same setting"
        )
    caption = (
        "Where the mean curve first reached the target: round, MB of tensors in both "
        f"directions, and modelled seconds. The target is {origin}; {NOTHING} means "
        "never."
    )
    table = Table("target", caption, columns, rows)
    return [Section("Bytes and time to the target", [_model(rates)], tables=[table])]


def _level(group: Group, head: Headline) -> float:
    """Return the mean of a group's last evaluations."""
    return fmean(over_runs(group, partial(last_mean, head=head)))


def _heterogeneity(groups: list[Group], head: Headline) -> list[Section]:
    charts, tables = [], []
    found: dict[str, Look] = {}
    several = list(families(groups, head))
    for number, family in enumerate(several, start=1):
        levels = sorted(family, key=lambda group: evenness(group.config))
        columns = list(dict.fromkeys(group.heterogeneity for group in levels))
        rows = rows_of_methods(family)
        has_fft = any(group.is_reference for group in family)
        if len(rows) < 2 or not (has_fft or len(columns) > 1):
            continue
        name = f"heterogeneity-{number}" if len(several) > 1 else "heterogeneity"
        levels_of = {
            row: {g.heterogeneity: head.scale * _level(g, head) for g in members}
            for row, members in rows.items()
        }
        gaps = {
            row: {
                group.heterogeneity: head.scale
                * (_level(group, head) - _level(fft, head))
                for group in members
                if (fft := fft_beside(group, family, head)) is not None
            }
            for row, members in rows.items()
        }
        tables.append(_gap_table(name, levels_of, gaps, columns, has_fft, head))
        if len(columns) > 1:
            found |= looks(rows, [members[0].method for members in rows.values()])
            shown = {head.axis: levels_of}
            if has_fft:
                shown[f"gap to fft{', points' if head.percent else ''}"] = gaps
            charts += [
                _levels_chart(y, values, columns, found) for y, values in shown.items()
            ]
    if not tables:
        return []
    text = [
        f"Mean {head.name} over the last {head.last} evaluations and over seeds, from "
        "even to uneven partitions. Groups in one table differ in method, in keys "
        "specific to the method, such as its learning rate, and in heterogeneity."
    ]
    return [Section("Methods by heterogeneity", text, keys(found), charts, tables)]


Levels = dict[str, dict[str, float]]


def _gap_table(
    name: str,
    levels: Levels,
    gaps: Levels,
    columns: list[str],
    has_fft: bool,
    head: Headline,
) -> Table:
    headings = [Column("method", "method")]
    for column in columns:
        headings.append(Column(f"{column}{head.unit}", column, head.spec))
        if has_fft:
            headings.append(Column("gap", f"{column} gap", f"+{head.spec}"))
    rows: list[list[Cell]] = []
    for row, by_column in levels.items():
        cells: list[Cell] = [row]
        for column in columns:
            cells.append(by_column.get(column))
            if has_fft:
                cells.append(gaps[row].get(column))
        rows.append(cells)
    unit = "points" if head.percent else "how far"
    gap = f"; gap: {unit} above full fine-tuning in the same setting" if has_fft else ""
    told = f"{head.name.capitalize()} by heterogeneity{gap}."
    return Table(name, told, headings, rows)


def _levels_chart(
    y: str, values: Levels, columns: list[str], found: dict[str, Look]
) -> Chart:
    lines = []
    for row, by_column in values.items():
        places = [i for i, column in enumerate(columns) if column in by_column]
        heights = [by_column[columns[i]] for i in places]
        if places:
            lines.append(Line(row, found[row], places, heights))
    return line_chart(
        f"{y.split(',')[0].capitalize()} from {columns[0]} to {columns[-1]}.",
        lines,
        x="more uneven →",
        y=y,
        ticks=columns,
    )


def _energies(groups: list[Group]) -> list[Section]:
    rows: list[list[Cell]] = []
    lines: dict[str, dict[int, float]] = {}
    layers: set[int] = set()
    means = {group.label: _mean_energies(group) for group in groups}
    means = {label: kinds for label, kinds in means.items() if kinds}
    if not means:
        return []
    for label, kinds in means.items():
        by_number: dict[int, list[float]] = {}
        for shares in kinds.values():
            for layer, share in shares.items():
                by_number.setdefault(layer, []).append(100 * share)
        lines[label] = {layer: fmean(s) for layer, s in sorted(by_number.items())}
        layers |= lines[label].keys()
    ordered = sorted(layers)
    for label, kinds in means.items():
        for kind, shares in kinds.items():
            cells = [_percent(shares.get(layer)) for layer in ordered]
            rows.append([label, kind, 100 * fmean(shares.values()), *cells])
    found = looks(lines, lines)
    chart = line_chart(
        "Energy kept per layer, mean over kinds of matrix.",
        [
            Line(label, found[label], list(shares), list(shares.values()))
            for label, shares in lines.items()
        ],
        x="layer",
        y="energy kept, %",
        whole=True,
    )
    table = Table(
        "energies",
        "Energy kept, %, per kind of matrix and layer; mean over runs.",
        [
            GROUP,
            Column("matrix", "matrix"),
            Column("mean", "mean", ".1f"),
            *(Column(str(layer), f"layer_{layer}", ".1f") for layer in ordered),
        ],
        rows,
        folded=True,
    )
    text = "The share of the squared norm of each matrix's change that the rank keeps."
    return [
        Section("Energy kept by the handoff", [text], keys(found), [chart], [table])
    ]


def _mean_energies(group: Group) -> dict[str, dict[int, float]]:
    matrices: dict[str, list[float]] = {}
    for run in group.runs:
        for name, share in run.energies.items():
            matrices.setdefault(name, []).append(share)
    return by_layer({name: fmean(shares) for name, shares in matrices.items()})


def _spread(groups: list[Group]) -> list[Section]:
    losses = {group.label: late_losses(group) for group in groups}
    boxes = [
        (label, np.quantile(values, (0, 0.25, 0.5, 0.75, 1)).tolist())
        for label, values in losses.items()
        if values
    ]
    if not boxes:
        return []
    caption = (
        "Training losses of clients: minimum, quartiles and maximum over clients and "
        "runs of a client's mean in the last fifth of the rounds."
    )
    columns = [
        GROUP,
        Column("clients", "clients", "d"),
        *(
            Column(name, name.replace(" ", "_"), ".3f")
            for name in ("minimum", "first quartile", "median", "third quartile")
        ),
        Column("maximum", "maximum", ".3f"),
    ]
    rows = [[label, len(losses[label]), *values] for label, values in boxes]
    chart = box_chart(caption, boxes, x="training loss")
    table = Table("spread", "The same in figures.", columns, rows)
    return [Section("Spread over clients", charts=[chart], tables=[table])]


def _failures(groups: list[Group]) -> list[Section]:
    rows: list[list[Cell]] = []
    for group in groups:
        failures = [f for run in group.runs + group.others for f in run.failures]
        reasons = Counter(failure.reason for failure in failures)
        rows += [[group.label, n, reason] for reason, n in reasons.most_common()]
    if not rows:
        return []
    columns = [GROUP, Column("times", "times", "d"), Column("reason", "reason")]
    caption = "What was excluded from rounds, by reason, over all runs of a group."
    table = Table("failures", caption, columns, rows)
    return [Section("Failures", tables=[table])]


def _configs(groups: list[Group], folder: Path | None) -> Section:
    default = flatten(RunConfig())
    first, *rest = (group.config for group in groups)
    common = [
        [key, str(value), str(default.get(key, ""))]
        for key, value in first.items()
        if value != default.get(key) and all(c.get(key) == value for c in rest)
    ]
    columns = [Column("key", "key"), Column("value", "value")]
    tables = [
        Table(
            "common-config",
            "Values that all groups share and that are not the default",
            [*columns, Column("default", "default")],
            common,
            folded=True,
        ),
        Table(
            "runs",
            "All runs",
            [Column("run", "run"), GROUP, Column("seed", "seed"), Column("", "state")],
            [
                [
                    "/".join(run.path.parts[-2:]),
                    group.label,
                    str(run.config["seed"]),
                    _state(run),
                ]
                for group in groups
                for run in group.runs + group.others
            ],
            folded=True,
            links=[
                _link(run, folder)
                for group in groups
                for run in group.runs + group.others
            ],
        ),
    ]
    left_out = sum(len(group.others) for group in groups)
    text = []
    if left_out:
        text = [
            f"{left_out} of the runs did not complete while others of their group did; "
            "they count only among the failures."
        ]
    runs = [run for group in groups for run in group.runs + group.others]
    text += [f"{run.path.name}: {run.damage}" for run in runs if run.damage]
    return Section("Runs", text, tables=tables)


def _link(run: RecordedRun, folder: Path | None) -> str | None:
    """Return the address of a run's report, relative to a folder, if there is one."""
    page = run.path / "report.html"
    if folder is None or not page.is_file():
        return None
    return quote(os.path.relpath(page.resolve(), folder.resolve()))


def _state(run: RecordedRun) -> str:
    done = f"{len(run.rounds)} of {run.config['rounds']} rounds"
    return "completed" if run.summary is not None else f"not completed: {done}"
