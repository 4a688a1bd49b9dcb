"""Discrete Gaussian noise: its probabilities, and those of sums of it."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chisquare

from slora_flwr.privacy.discrete_gaussian import LEAST_STD, Words, draw, entropy


def words_of(seed: int) -> Words:
    stream = np.random.Philox(seed)
    return lambda count: np.asarray(stream.random_raw(count), np.uint64)


def probabilities(std: float, reach: int) -> NDArray[np.float64]:
    """Return those of -reach to reach, by the definition."""
    values = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * std**2))
    return np.asarray(values / values.sum())


@pytest.mark.parametrize("std", [0.6, 1.0, 3.0, 7.5, 40.0])
def test_values_have_the_probabilities_of_the_definition(std: float) -> None:
    count, reach = 400_000, math.ceil(8 * std)
    drawn = draw(std, count, words_of(1))
    expected = count * probabilities(std, reach)
    seen = np.bincount((drawn + reach).clip(0, 2 * reach), minlength=2 * reach + 1)
    often = expected > 20
    rest = [count - seen[often].sum()], [count - expected[often].sum()]
    told = chisquare(
        [*seen[often], *rest[0]], [*expected[often], max(rest[1][0], 1e-9)]
    )
    assert told.pvalue > 1e-4


@pytest.mark.parametrize("std", [2.0**16 - 0.5, 123_456.7])
def test_wide_noise_has_its_moments(std: float) -> None:
    count = 200_000
    drawn = draw(std, count, words_of(2)) / std
    # Six standard errors of each moment of a normal distribution.
    for power, moment, error in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
        assert abs(np.mean(drawn**power) - moment) < 6 * math.sqrt(error / count)
    assert np.abs(drawn).max() < 6.5


def test_as_many_values_as_asked_come_from_the_systems_entropy() -> None:
    assert [len(draw(5.0, count)) for count in (0, 1, 100, 70_000)] == [
        0,
        1,
        100,
        70_000,
    ]
    assert len({*map(int, entropy(1000))}) == 1000


@pytest.mark.parametrize(("one", "other"), [(0.6, 0.6), (0.8, 0.8), (0.7, 1.4)])
def test_a_sum_of_two_is_nearly_one_of_both_variances(one: float, other: float) -> None:
    """The bound in the module's text, against a sum of all cases."""
    reach = 12
    both = np.convolve(probabilities(one, 60), probabilities(other, 60))
    middle = len(both) // 2
    found = both[middle - reach : middle + reach + 1]
    single = probabilities(math.hypot(one, other), 60)[60 - reach : 60 + reach + 1]
    apart = float(np.abs(np.log(found / single)).max())
    squared = one**2 * other**2 / (one**2 + other**2)
    eta = 2 * math.exp(-2 * math.pi**2 * squared)
    assert apart <= 2 * math.log1p(2 * eta)
    # It is no loose bound either.
    assert apart > eta / 4


def test_shares_of_the_least_std_cannot_be_told_from_a_single_draw() -> None:
    eta = 2 * math.exp(-2 * math.pi**2 * LEAST_STD**2 / 2)
    assert eta < 1e-38
    assert 1e5 * 1e9 * 4 * eta < 1e-23
