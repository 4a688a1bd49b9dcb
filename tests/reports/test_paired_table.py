"""Differences between methods, seed by seed, by figures worked out by hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from slora_flwr.reports.comparison_page import compare
from slora_flwr.reports.paired_table import paired_mean
from slora_flwr.runs.reader import read_run
from tests.support.recorded import Config, write_run

# Of Student's t with 2 degrees of freedom, F(t) = 1/2 + t / (2 sqrt(2 + t^2)).
T_2 = 0.95 * (2 / (1 - 0.95**2)) ** 0.5


def probability_2(t: float) -> float:
    """Return that of a t at least as far from 0."""
    return 1 - t / (2 + t**2) ** 0.5


def test_three_differences_by_hand() -> None:
    found = paired_mean([1.0, 2.0, 3.0])
    error = 1 / 3**0.5
    assert (found.pairs, found.mean, found.deviation) == (3, 2.0, 1.0)
    assert found.low == pytest.approx(2 - T_2 * error)
    assert found.high == pytest.approx(2 + T_2 * error)
    assert found.probability == pytest.approx(probability_2(2 / error))


def test_equal_differences_tell_no_spread() -> None:
    for equal in ([0.5, 0.5], [100 * (0.61 - 0.59), 100 * (0.51 - 0.49)]):
        found = paired_mean(equal)
        assert (found.deviation, found.low, found.high) == (0, None, None)
        assert found.probability is None


def write_runs(
    folder: Path, curves: Mapping[str, Sequence[float]], **keys: Any
) -> None:
    """Write two runs of each method, of seeds 0 and 1, that end alike."""
    for method, curve in curves.items():
        for seed in (0, 1):
            path = folder / f"{method}-{seed}-{len([*folder.iterdir()])}"
            write_run(path, {"method": method, "seed": seed} | keys, curve)


def tables_of(folder: Path, last: int = 5) -> dict[str, list[dict[str, Any]]]:
    """Return the tables of paired differences of the runs in a folder, by name."""
    page = compare([read_run(path) for path in folder.iterdir()], (1.0,), last=last)
    return {
        table.name: [
            dict(zip([c.name for c in table.columns], row, strict=True))
            for row in table.rows
        ]
        for section in page.sections
        for table in section.tables
        if table.name.startswith("paired")
    }


def test_runs_are_paired_by_seed_in_each_partition(tmp_path: Path) -> None:
    fft = {0: 0.50, 1: 0.60, 2: 0.70, 7: 0.90}
    lora = {2: 0.67, 1: 0.58, 0: 0.49, 8: 0.10}
    for alpha in (0.1, 10.0):
        for name, rates, accuracies in (
            ("fft", {"method": "fft"}, fft),
            ("lora", {"lora.lr": 0.1 * alpha}, lora),
        ):
            for seed, accuracy in accuracies.items():
                given: Config = {"clients.alpha": alpha, **rates, "seed": seed}
                shift = 0.02 if alpha > 1 and name == "lora" else 0.0
                path = tmp_path / f"{name}-{seed}-{alpha}"
                write_run(path, given, [accuracy - shift] * 2)
    [rows] = tables_of(tmp_path).values()
    level, uneven, both = [row for row in rows if row["against"] == "fft"]
    assert {row["method"] for row in (level, uneven, both)} == {"lora"}
    told = [row["partition"] for row in (level, uneven, both)]
    assert told == ["alpha=10", "alpha=0.1", "all 2"]
    # Seeds 7 and 8 have no partner, and a seed counts once.
    assert [row["pairs"] for row in (level, uneven, both)] == [3, 3, 3]
    assert level["difference"] == pytest.approx(-4)
    assert uneven["difference"] == pytest.approx(-2)
    assert both["difference"] == pytest.approx(-3)
    assert uneven["sd"] == pytest.approx(1)
    assert uneven["p"] == pytest.approx(probability_2(2 * 3**0.5))
    # fft is told against lora, too.
    others = [row["difference"] for row in rows if row["against"] == "lora"]
    assert others == [pytest.approx(4), pytest.approx(2), pytest.approx(3)]


def test_settings_are_not_mixed(tmp_path: Path) -> None:
    for length, accuracy in ((64, 0.4), (128, 0.2)):
        curves = {"fft": [0.5], "lora": [accuracy]}
        write_runs(tmp_path, curves, **{"data.max-length": length})
    tables = tables_of(tmp_path)
    assert [*tables] == ["paired-1", "paired-2"]
    found = [row for rows in tables.values() for row in rows if row["against"] == "fft"]
    assert sorted(row["difference"] for row in found) == [
        pytest.approx(-30),
        pytest.approx(-10),
    ]


def test_the_reference_has_the_most_seeds_in_common(tmp_path: Path) -> None:
    write_runs(tmp_path, {"fft": [0.5], "lora": [0.4]}, **{"train.lr": 0.1})
    write_run(tmp_path / "better", {"method": "fft", "train.lr": 0.2}, [0.9])
    [rows] = tables_of(tmp_path).values()
    told = [row["difference"] for row in rows if row["against"] == "fft"]
    assert told == [pytest.approx(-10)]


@pytest.mark.parametrize(
    ("before", "after"),
    [('"cohort": [0, 1, 7]', '"cohort": [0, 1, 8]'), ('"round": 2', '"round": 3')],
)
def test_other_cohorts_or_evaluations_make_no_pair(
    tmp_path: Path, before: str, after: str
) -> None:
    write_runs(tmp_path, {"fft": [0.5, 0.6], "lora": [0.4, 0.5]})
    assert tables_of(tmp_path)
    [path] = tmp_path.glob("lora-1-*")
    events = path / "events.jsonl"
    assert before in events.read_text()
    events.write_text(events.read_text().replace(before, after))
    assert not tables_of(tmp_path)


def test_one_seed_makes_no_table(tmp_path: Path) -> None:
    for method in ("fft", "lora"):
        write_run(tmp_path / method, {"method": method})
    assert not tables_of(tmp_path)


def test_less_perplexity_is_better(tmp_path: Path) -> None:
    for method, perplexities in (("fft", (9.0, 5.0)), ("lora", (9.0, 7.0))):
        for seed in (0, 1):
            config: Config = {"method": method, "seed": seed, "task": "causal-lm"}
            path = tmp_path / f"{method}-{seed}"
            write_run(path, config, [0.0] * 2, perplexities=perplexities)
    [rows] = tables_of(tmp_path, last=1).values()
    [row] = [row for row in rows if row["against"] == "fft"]
    assert row["difference"] == pytest.approx(2)


def test_the_last_evaluations_are_as_many_as_asked_for(tmp_path: Path) -> None:
    write_runs(tmp_path, {"fft": [0.1, 0.5, 0.6], "lora": [0.1, 0.4, 0.3]})
    for last, gap in ((1, -30.0), (2, -20.0)):
        [rows] = tables_of(tmp_path, last).values()
        [row] = [row for row in rows if row["against"] == "fft"]
        assert row["difference"] == pytest.approx(gap)
