"""Differences between methods, seed by seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from slora_flwr.config.methods import REFERENCES
from slora_flwr.reports.figures import Headline
from slora_flwr.reports.groups import (
    Group,
    evenness,
    families,
    last_mean,
    over_runs,
    rows_of_methods,
)
from slora_flwr.reports.page import Cell, Column, Section, Table
from slora_flwr.runs.reader import RecordedRun

CONFIDENCE = 0.95
# Differences that differ by less are equal but for rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class PairedMean:
    """The mean of paired differences, and how certain it is.

    Attributes
    ----------
    pairs : int
        Number of differences, at least 2.
    mean, deviation : float
        Their mean and standard deviation (n - 1).
    low, high : float or None
        Bounds of the mean at `CONFIDENCE`, by Student's t; None if all differences are
        equal, which tells nothing of their spread.
    probability : float or None
        That of a mean at least as far from 0 if the true mean were 0 (two-sided paired
        t-test); None if all differences are equal.
    """

    pairs: int
    mean: float
    deviation: float
    low: float | None = None
    high: float | None = None
    probability: float | None = None


def paired_mean(differences: Sequence[float]) -> PairedMean:
    """Return the mean of paired differences, with its interval.

    Parameters
    ----------
    differences : Sequence[float]
        At least two.
    """
    pairs, mean, deviation = len(differences), fmean(differences), stdev(differences)
    if deviation <= _ROUNDING * max(1.0, abs(mean)):
        return PairedMean(pairs, mean, 0.0)
    from scipy.stats import ttest_1samp  # takes a second to import

    found = ttest_1samp(differences, 0.0)
    low, high = map(float, found.confidence_interval(CONFIDENCE))
    return PairedMean(pairs, mean, deviation, low, high, float(found.pvalue))


def paired(groups: Sequence[Group], head: Headline) -> list[Section]:
    """Return the section on differences to the references, seed by seed.

    Runs make a pair if they have the same seed, the same cohort in each round, and
    evaluations after the same rounds. For a method that was run in several partitions
    there is a further row, of the mean over partitions of each seed.
    """
    tables = []
    every = list(families(groups, head))
    for number, family in enumerate(every, start=1):
        rows = [row for name in REFERENCES for row in _rows(family, name, head)]
        if rows:
            name = f"paired-{number}" if len(every) > 1 else "paired"
            tables.append(_table(name, rows, head))
    if not tables:
        return []
    better = "below" if head.is_lower_better else "above"
    text = [
        "Runs with the same seed have the same clients and, in each round, the same "
        "cohort. So their difference depends less on chance than each figure does. "
        f"The difference is the mean {head.name} of a run's last {head.last} "
        "evaluations, minus that of the reference's run with the same seed"
        f"{', in points' if head.percent else ''}; {better} 0 is better. The reference "
        "is the best of its groups in the same setting, of those with the most seeds "
        f"in common. Bounds are those of the {CONFIDENCE:.0%} interval by Student's t. "
        "p is the probability of so large a mean if the methods did not differ; among "
        "many rows some are small by chance."
    ]
    return [Section("Seed by seed", text, tables=tables)]


def _rows(
    family: Sequence[Group], reference: str, head: Headline
) -> Iterator[list[Cell]]:
    """Yield the rows of all methods against one."""
    for name, members in rows_of_methods(family).items():
        found: dict[str, dict[int, float]] = {}
        for group in sorted(members, key=lambda group: evenness(group.config)):
            differences = _differences(group, family, reference, head)
            if len(differences) > 1:
                found[group.heterogeneity] = differences
        common = set[int].intersection(*map(set, found.values())) if found else set()
        if len(found) > 1 and len(common) > 1:
            found[f"all {len(found)}"] = {
                seed: fmean(by_seed[seed] for by_seed in found.values())
                for seed in sorted(common)
            }
        for partition, by_seed in found.items():
            told = paired_mean([*by_seed.values()])
            yield [
                name,
                partition,
                reference,
                told.pairs,
                told.mean,
                told.deviation,
                told.low,
                told.high,
                told.probability,
            ]


def _differences(
    group: Group, family: Sequence[Group], reference: str, head: Headline
) -> dict[int, float]:
    """Return the difference of each seed to a method's group, empty if it has none."""
    if group.method == reference:
        return {}
    candidates = []
    for other in family:
        if other.method == reference and other.setting == group.setting:
            pairs = _pairs(group, other, head)
            sign = -1 if head.is_lower_better else 1
            level = sign * fmean(over_runs(other, lambda run: last_mean(run, head)))
            candidates.append((len(pairs), level, pairs))
    _, _, pairs = max(candidates, key=lambda found: found[:2], default=(0, 0.0, {}))
    return dict(sorted(pairs.items()))


def _pairs(group: Group, other: Group, head: Headline) -> dict[int, float]:
    """Return by seed how far runs are above those of another group."""
    theirs = {_course(run): last_mean(run, head) for run in other.runs}
    found = {}
    for run in group.runs:
        level, beside = last_mean(run, head), theirs.get(_course(run))
        if level is not None and beside is not None:
            found[int(run.config["seed"])] = head.scale * (level - beside)
    return found


def _course(run: RecordedRun) -> tuple[object, ...]:
    """Return what two runs of a pair have in common."""
    cohorts = tuple(tuple(done.cohort) for done in run.rounds)
    return run.config["seed"], cohorts, tuple(done.round for done in run.evaluated)


def _table(name: str, rows: list[list[Cell]], head: Headline) -> Table:
    columns = [
        Column("method", "method"),
        Column("partition", "partition"),
        Column("against", "against"),
        Column("pairs", "pairs", "d"),
        Column("difference", "difference", f"+{head.spec}"),
        Column("± sd", "sd", head.spec),
        Column("from", "low", f"+{head.spec}"),
        Column("to", "high", f"+{head.spec}"),
        Column("p", "p", ".2g"),
    ]
    caption = (
        "Differences to the references; in rows of all partitions, a seed counts once."
    )
    return Table(name, caption, columns, rows)
