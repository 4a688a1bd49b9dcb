"""Renyi divergences of noised sums, by dp-accounting."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import dp_accounting
import numpy as np
from dp_accounting.rdp import RdpAccountant, compute_epsilon

from slora_flwr.privacy.accountant import Release

# Beyond the rounding errors in the accountant's divergences.
_ROUNDING = 1e-12
# Below it epsilon means nothing.
_LEAST_NOISE = 1e-3


@cache
def spent(releases: tuple[Release, ...], delta: float) -> float:
    """Return the epsilon that releases of different kinds have spent together."""
    if not releases:
        return 0.0
    with _quiet():
        return _Accountant().compose(_event(releases)).get_epsilon(delta)


@cache
def least_noise(releases: tuple[Release, ...], epsilon: float, delta: float) -> float:
    """Return the least noise multiplier; see `accountant.calibrate`."""

    def event(noise: float) -> dp_accounting.DpEvent:
        return _event([replace(kind, noise_multiplier=noise) for kind in releases])

    def spent_with(noise: float) -> float:
        kinds = tuple(replace(kind, noise_multiplier=noise) for kind in releases)
        return spent(kinds, delta)

    # The library's own search begins with next to no noise, at which it takes long.
    least = most = 1.0
    while spent_with(most) > epsilon:
        least, most = most, 2 * most
    while spent_with(least) <= epsilon and least > _LEAST_NOISE:
        least, most = least / 1.5, least
    if spent_with(least) <= epsilon:
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
