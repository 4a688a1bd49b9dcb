"""What differential privacy costs: epsilon of noised sums, and noise for an epsilon.

Each release is a Poisson-sampled Gaussian mechanism: every record joins a sum
independently with the same rate, has an L2 norm of at most a bound, and the sum gets
Gaussian noise. Neighbours differ by one record, added or removed. The divergences of
all releases add up (Mironov et al., arXiv 1908.10530).
"""

from collections.abc import Iterable
from dataclasses import dataclass


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
    # Imported here, since dp-accounting takes a second, and most runs are not private.
    from slora_flwr.privacy.renyi import spent

    return spent(unite(releases), delta)


def calibrate(releases: Iterable[Release], epsilon: float, delta: float) -> float:
    """Return the least noise multiplier at which releases spend at most an epsilon.

    Parameters
    ----------
    releases : Iterable[Release]
        The releases. Their own noise multipliers do not count.
    epsilon, delta : float
        The guarantee.
    """
    from slora_flwr.privacy.renyi import least_noise

    return least_noise(unite(releases), epsilon, delta)
