"""Epsilon of releases of several kinds, and noise for an epsilon."""

import math

import dp_accounting
import pytest
from dp_accounting.rdp import RdpAccountant

from slora_flwr.privacy.accountant import Release, calibrate, epsilon, unite
from tests.server.test_privacy import renyi

DELTA = 1e-4
MIXED = [Release(0.02, 0.8, 60), Release(0.05, 1.1, 40), Release(1.0, 12.0, 3)]


def test_kinds_are_as_dp_accounting_composes_them() -> None:
    accountant = RdpAccountant()
    for rate, noise, steps in ((0.02, 0.8, 60), (0.05, 1.1, 40), (1.0, 12.0, 3)):
        event = dp_accounting.GaussianDpEvent(noise)
        sampled = dp_accounting.PoissonSampledDpEvent(rate, event)
        accountant.compose(sampled, steps)
    assert epsilon(MIXED, DELTA) == pytest.approx(accountant.get_epsilon(DELTA))


def test_kinds_against_the_formula() -> None:
    """Divergences add up order by order (arXiv 1908.10530), then become epsilon."""
    expected = min(
        sum(r.steps * renyi(a, r.rate, r.noise_multiplier) for r in MIXED)
        + math.log1p(-1 / a)
        - math.log(DELTA * a) / (a - 1)
        for a in range(2, 200)
    )
    # Orders between the whole ones can only better it.
    assert 0.9 * expected < epsilon(MIXED, DELTA) <= expected * (1 + 1e-9)


def test_one_release_of_all_by_hand() -> None:
    """At order 16 and noise 4: 16 / 32 + log(15 / 16) - log(16e-4) / 15 = 0.8646."""
    found = epsilon([Release(1.0, 4.0, 1)], DELTA)
    assert 0.99 * 0.8646 < found <= 0.8647


def test_order_and_grouping_do_not_matter() -> None:
    parts = [Release(0.02, 0.8, 25), *MIXED[1:], Release(0.02, 0.8, 35)]
    assert unite(parts) == unite(MIXED)
    assert epsilon(parts, DELTA) == epsilon(MIXED, DELTA)
    assert epsilon(MIXED[::-1], DELTA) == pytest.approx(epsilon(MIXED, DELTA))


def test_nothing_released_costs_nothing() -> None:
    assert epsilon([], DELTA) == epsilon([Release(0.1, 1.0, 0)], DELTA) == 0.0


@pytest.mark.parametrize("target", [0.05, 0.5, 8.0, 60.0])
def test_the_noise_is_the_least_for_an_epsilon(target: float) -> None:
    noise = calibrate(MIXED, target, DELTA)
    found = epsilon([Release(r.rate, noise, r.steps) for r in MIXED], DELTA)
    assert 0.999 * target < found <= target


def test_an_epsilon_that_means_nothing_takes_next_to_no_noise() -> None:
    assert calibrate([Release(0.5, 0.0, 1)], 1e9, DELTA) < 1e-3
