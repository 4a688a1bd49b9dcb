"""The audit of differential privacy: it finds faults, and none where there is none."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import audit


@pytest.fixture
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def test_bounds_against_hand_worked_numbers() -> None:
    """For no hit in n the upper bound solves (1 - p)^n = 0.025.

    For 5 in 10, tables have 0.1871 and 0.8129.
    """
    assert audit.bounds(0, 200) == (0.0, pytest.approx(1 - 0.025 ** (1 / 200)))
    assert audit.bounds(200, 200) == (pytest.approx(0.025 ** (1 / 200)), 1.0)
    assert audit.bounds(5, 10) == pytest.approx((0.1871, 0.8129), abs=5e-5)


def test_the_proven_epsilon_against_hand_worked_numbers() -> None:
    """At delta 0.01; all of 200 told apart prove log((0.98172 - 0.01) / 0.01828)."""
    assert audit.prove(200, 200, 0, 200) == pytest.approx(3.973, abs=1e-3)
    # All of 60 and 50 of 60: p >= 0.94037 and f <= 0.91707, so that log(p / f) is 0.01,
    # and log((1 - 0.91707 - 0.01) / (1 - 0.94037)) more.
    assert audit.prove(60, 60, 50, 60) == pytest.approx(0.2013, abs=1e-3)
    assert audit.prove(5, 10, 0, 10) == 0.0


def test_thresholds_are_not_judged_by_the_runs_that_chose_them() -> None:
    """Even runs are told apart and odd ones are the same; taken together, they show."""
    with_canary, without = [1.0, 0.0] * 50, [-1.0, 0.0] * 50
    hits, runs, alarms, _ = audit.judge(with_canary, without)
    assert (hits, runs) == (alarms, 50)
    assert audit.prove(hits, runs, alarms, runs) == 0.0


def test_the_score_is_the_log_of_the_likelihood_ratio() -> None:
    """By hand, with a quarter for joining and noise multiplier 2.

    In one round it is log(3/4 + 1/4 exp((2 x - 1) / 8)). Two rounds seen as one step
    have variance 8: log(9/16 + 6/16 exp((2 x - 1) / 16) + 1/16 exp((4 x - 4) / 16)).
    """
    one = math.log(0.75 + 0.25 * math.exp(1.5 / 8))
    two = math.log(9 / 16 + 6 / 16 * math.exp(5 / 16) + math.exp(8 / 16) / 16)
    found = audit.score([(1, 1.25), (2, 3.0)], rate=0.25, noise=2.0)
    assert found == pytest.approx(one + two)


def test_runs_that_are_there_are_not_made_again(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    every = list(audit.missing(path, 2))
    assert len(every) == 4 * len(audit.SETTINGS)
    path.write_text("setting,canary,run,score\nepsilon 4,0,1,0.5\nepsilon 1,1,0,0.5\n")
    left = [*every]
    left.remove(("epsilon 4", False, 1))
    left.remove(("epsilon 1", True, 0))
    assert list(audit.missing(path, 2)) == left


class Silent(np.random.Generator):
    """A generator whose normal numbers are zero."""

    def normal(self, loc: Any = 0.0, scale: Any = 1.0, size: Any = None) -> Any:
        return np.zeros(size)


@pytest.mark.usefixtures("_quiet")
def test_the_canary_moves_the_sum_by_its_bound_or_is_not_there() -> None:
    everyone = audit.Setting(1.0, audit.COUNT, audit.COUNT, Silent)
    for has_canary in (True, False):
        steps = audit.observe(everyone, has_canary, [0])
        assert [rounds for rounds, _ in steps] == [1, 1, 1]
        found = [step for _, step in steps]
        # Values are rounded to whole numbers, and the state to float32.
        assert found == pytest.approx([float(has_canary)] * 3, abs=1e-5)


@pytest.mark.usefixtures("_quiet")
def test_faint_noise_is_found_and_the_noise_claimed_is_not() -> None:
    """By 20 runs of each kind: the most they can prove is an epsilon of 1.59."""
    proven = []
    for generator in (np.random.Generator, audit.Faint):
        everyone = audit.Setting(1.0, audit.COUNT, audit.COUNT, generator)
        scores = [
            [audit.attack(everyone, has_canary, [i, has_canary]) for i in range(20)]
            for has_canary in (True, False)
        ]
        proven.append(audit.prove(*audit.count(0.0, *scores)))
    assert proven[0] <= 1.0 < proven[1]
