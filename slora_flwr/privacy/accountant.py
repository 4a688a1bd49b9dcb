"""What differential privacy costs: epsilon of noised sums, and noise for an epsilon.

Each release is a Poisson-sampled Gaussian mechanism: every record joins a sum
independently with the same rate, has an L2 norm of at most a bound, and the sum gets
Gaussian noise. Neighbours differ by one record, added or removed. The divergences of
all releases add up (Mironov et al., arXiv 1908.10530).
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import dp_accounting
import numpy as np
from dp_accounting.rdp import RdpAccountant, compute_epsilon

# Beyond the rounding errors in the accountant's divergences.
_ROUNDING = 1e-12
# Below it epsilon means nothing.
_LEAST_NOISE = 1e-3


@dataclass(frozen=True)
class Release:
    """Some noised sums of the same kind.

    Attributes
    ----------
    rate : float
        The probability with which a record joins a sum.
    noise_multiplier : float
        The standard deviation of a sum's noise, over the bound of a record's norm.
    steps : int
        The number of sums.
    """

    rate: float
    noise_multiplier: float
    steps: int


def unite(releases: Iterable[Release]) -> tuple[Release, ...]:
    """Return releases with the steps of those of the same kind added up."""
    steps: dict[tuple[float, float], int] = {}
    for release in releases:
        kind = release.rate, release.noise_multiplier
        steps[kind] = steps.get(kind, 0) + release.steps
    return tuple(Release(*kind, count) for kind, count in steps.items() if count)


def epsilon(releases: Iterable[Release], delta: float) -> float:
    """Return the epsilon that releases have spent together, at a delta."""
    return _epsilon(unite(releases), delta)


def calibrate(releases: Iterable[Release], epsilon: float, delta: float) -> float:
    """Return the least noise multiplier at which releases spend at most an epsilon.

    Parameters
    ----------
    releases : Iterable[Release]
        The releases. Their own noise multipliers do not count.
    epsilon, delta : float
        The guarantee.
    """
    return _calibrate(unite(releases), epsilon, delta)


@cache
def _epsilon(releases: tuple[Release, ...], delta: float) -> float:
    if not releases:
        return 0.0
    with _quiet():
        return _Accountant().compose(_event(releases)).get_epsilon(delta)


@cache
def _calibrate(releases: tuple[Release, ...], epsilon: float, delta: float) -> float:
    def event(noise: float) -> dp_accounting.DpEvent:
        return _event([replace(kind, noise_multiplier=noise) for kind in releases])

    def spent(noise: float) -> float:
        kinds = tuple(replace(kind, noise_multiplier=noise) for kind in releases)
        return _epsilon(kinds, delta)

    # The library's own search begins with next to no noise, at which it takes long.
    least = most = 1.0
    while spent(most) > epsilon:
        least, most = most, 2 * most
    while spent(least) <= epsilon and least > _LEAST_NOISE:
        least, most = least / 1.5, least
    if spent(least) <= epsilon:
        return least
    with _quiet():
        found = dp_accounting.calibrate_dp_mechanism(
            _Accountant,
            event,
            epsilon,
            delta,
            dp_accounting.ExplicitBracketInterval(least, most),
        )
    return float(found)


class _Accountant(RdpAccountant):
    """dp-accounting's accountant, which rounding errors cannot bring to epsilon 0.

    It takes a divergence that they made negative for epsilon 0, whatever delta.
    """

    def get_epsilon(self, target_delta: float) -> float:
        """Return epsilon from divergences of at least the rounding errors."""
        rdp = np.maximum(self.rdp, _ROUNDING)
        return float(compute_epsilon(self.orders, rdp, target_delta)[0])


def _event(releases: Iterable[Release]) -> dp_accounting.DpEvent:
    """Return the event of some releases, for the accountant."""
    events = []
    for release in releases:
        noise = dp_accounting.GaussianDpEvent(release.noise_multiplier)
        sampled = dp_accounting.PoissonSampledDpEvent(release.rate, noise)
        events.append(dp_accounting.SelfComposedDpEvent(sampled, release.steps))
    return dp_accounting.ComposedDpEvent(events)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the accountant's warnings about the orders that it skips.

    For them absl would add a handler to the root logger, which would print Flower's
    lines twice.
    """
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
