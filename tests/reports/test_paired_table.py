"""Differences between methods, seed by seed, by figures worked out by hand."""

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


def test_equal_differences_have_no_probability() -> None:
    found = paired_mean([0.5, 0.5])
    assert (found.low, found.high, found.probability) == (0.5, 0.5, None)


def test_runs_are_paired_by_seed_in_each_partition(tmp_path: Path) -> None:
    fft = {0: 0.50, 1: 0.60, 2: 0.70, 7: 0.90}
    lora = {2: 0.67, 1: 0.58, 0: 0.49, 8: 0.10}
    even: Config = {"clients.alpha": 10.0}
    for config in ({}, even):
        for name, rates, accuracies in (
            ("fft", {"method": "fft"}, fft),
            ("lora", {"lora.lr": 0.1 if config else 0.2}, lora),
        ):
            for seed, accuracy in accuracies.items():
                given: Config = {**config, **rates, "seed": seed}
                shift = 0.02 if config and name == "lora" else 0.0
                path = tmp_path / f"{name}-{seed}-{len(config)}"
                write_run(path, given, [accuracy - shift] * 2)
    page = compare([read_run(path) for path in tmp_path.iterdir()], (1.0,))
    [table] = [t for s in page.sections for t in s.tables if t.name == "paired"]
    names = [column.name for column in table.columns]
    rows: list[dict[str, Any]] = [
        dict(zip(names, row, strict=True)) for row in table.rows
    ]
    told = {row["group"]: row for row in rows if row["against"] == "fft"}
    assert len(told) == 3
    uneven, level, both = (
        next(row for label, row in told.items() if mark in label)
        for mark in ("alpha=0.1", "alpha=10", ", all")
    )
    # Seeds 7 and 8 have no partner.
    assert [uneven["pairs"], level["pairs"], both["pairs"]] == [3, 3, 6]
    assert uneven["difference"] == pytest.approx(-2)
    assert level["difference"] == pytest.approx(-4)
    assert both["difference"] == pytest.approx(-3)
    assert uneven["sd"] == pytest.approx(1)
    assert uneven["p"] == pytest.approx(probability_2(2 * 3**0.5))
    # fft is told against lora, too.
    others = [row["difference"] for row in rows if row["against"] == "lora"]
    assert others == [pytest.approx(-row["difference"]) for row in told.values()]


def test_one_seed_makes_no_table(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / m, {"method": m}) for m in ("fft", "lora")]
    page = compare([read_run(path) for path in paths], (1.0,))
    assert "paired" not in {t.name for s in page.sections for t in s.tables}


def test_the_last_evaluations_are_as_many_as_one_likes(tmp_path: Path) -> None:
    curves = {"fft": (0.1, 0.5, 0.6), "lora": (0.1, 0.4, 0.3)}
    for method, curve in curves.items():
        for seed in (0, 1):
            path = tmp_path / f"{method}-{seed}"
            write_run(path, {"method": method, "seed": seed}, curve)
    runs = [read_run(path) for path in tmp_path.iterdir()]
    for last, gap in ((1, 30.0), (2, 20.0)):
        page = compare(runs, (1.0,), last=last)
        tables = {table.name: table for s in page.sections for table in s.tables}
        assert f"last_{last}_percent" in [c.name for c in tables["results"].columns]
        [row] = [row for row in tables["paired"].rows if row[1] == "lora"]
        assert row[3] == pytest.approx(gap)
