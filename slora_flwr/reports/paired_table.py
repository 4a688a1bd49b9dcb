"""Differences between groups of runs, seed by seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean, stdev

from slora_flwr.config.methods import REFERENCES
from slora_flwr.reports.figures import Headline
from slora_flwr.reports.groups import Group, best_beside, last_mean, rows_of_methods
from slora_flwr.reports.page import Cell, Column, Section, Table

CONFIDENCE = 0.95


@dataclass(frozen=True)
class PairedMean:
    """The mean of paired differences, and what chance makes of it.

    Attributes
    ----------
    pairs : int
        Number of differences, at least 2.
    mean, deviation : float
        Their mean and standard deviation.
    low, high : float
        Bounds of the mean at `CONFIDENCE`, by Student's t.
    probability : float or None
        That a mean this far from 0 would come about by chance (two-sided paired
        t-test); None if all differences are equal.
    """

    pairs: int
    mean: float
    deviation: float
    low: float
    high: float
    probability: float | None


def paired_mean(differences: Sequence[float]) -> PairedMean:
    """Return the mean of paired differences, with its interval.

    Parameters
    ----------
    differences : Sequence[float]
        At least two.
    """
    mean, deviation = fmean(differences), stdev(differences)
    if not deviation:
        return PairedMean(len(differences), mean, 0.0, mean, mean, None)
    from scipy.stats import ttest_1samp  # takes a second to import

    found = ttest_1samp(differences, 0.0)
    low, high = found.confidence_interval(CONFIDENCE)
    p = float(found.pvalue)
    return PairedMean(len(differences), mean, deviation, float(low), float(high), p)


def paired(groups: Sequence[Group], head: Headline) -> list[Section]:
    """Return the section on differences to the references, seed by seed.

    Runs of one seed and setting have the same partition and the same cohorts. A method
    that was run in several partitions has a further row, with the pairs of all.
    """
    rows: list[list[Cell]] = []
    for reference in REFERENCES:
        found: dict[str, dict[str, list[float]]] = {}
        for name, members in _families(groups):
            for group in members:
                beside = best_beside(group, groups, reference, head)
                if beside is None or group.method == reference:
                    continue
                by_seed, others = _levels(group, head), _levels(beside, head)
                differences = [
                    head.scale * (by_seed[seed] - others[seed])
                    for seed in sorted(by_seed.keys() & others.keys())
                ]
                found.setdefault(name, {})[group.label] = differences
        for name, by_group in found.items():
            pooled = [*chain.from_iterable(by_group.values())]
            several = {f"{name}, all": pooled} if len(by_group) > 1 else {}
            for label, differences in (by_group | several).items():
                if len(differences) > 1:
                    rows.append([label, reference, *_cells(paired_mean(differences))])
    if not rows:
        return []
    text = [
        "Runs with the same seed have the same clients, and the same ones in each "
        "round. So differences between them owe less to chance than the figures do. "
        f"Mean {head.name} of the last evaluations less that of the reference, with "
        f"its {CONFIDENCE:.0%} interval by Student's t, and the probability of so "
        "large a difference by chance. Many rows at once make small probabilities "
        "less rare."
    ]
    columns = [
        Column("group", "group"),
        Column("against", "against"),
        Column("pairs", "pairs", "d"),
        Column("difference", "difference", f"+{head.spec}"),
        Column("deviation", "sd", head.spec),
        Column("from", "low", f"+{head.spec}"),
        Column("to", "high", f"+{head.spec}"),
        Column("p", "p", ".3f"),
    ]
    caption = "Differences to the references, seed by seed."
    return [
        Section("Seed by seed", text, tables=[Table("paired", caption, columns, rows)])
    ]


def _families(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    """Return the groups that differ in heterogeneity alone, with the methods' names."""
    settings: dict[object, list[Group]] = {}
    for group in groups:
        if group.ended:
            settings.setdefault(group.elsewhere, []).append(group)
    return [
        (name, members)
        for family in settings.values()
        for name, members in rows_of_methods(family).items()
    ]


def _levels(group: Group, head: Headline) -> dict[int, float]:
    """Return the figure of each seed, the mean over runs that repeat it."""
    found: dict[int, list[float]] = {}
    for run in group.runs:
        if (level := last_mean(run, head)) is not None:
            found.setdefault(int(run.config["seed"]), []).append(level)
    return {seed: fmean(levels) for seed, levels in found.items()}


def _cells(found: PairedMean) -> list[Cell]:
    return [
        found.pairs,
        found.mean,
        found.deviation,
        found.low,
        found.high,
        found.probability,
    ]
