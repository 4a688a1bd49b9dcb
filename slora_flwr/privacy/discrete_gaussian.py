"""Gaussian noise in whole numbers: the discrete Gaussian distribution.

Its values x have probabilities proportional to exp(-x² / (2 std²)). Added to a vector
of whole numbers of which two neighbours differ by an L2 norm of at most s, it satisfies
(s / std)² / 2 of concentrated differential privacy, as Gaussian noise does (Canonne,
Kamath and Steinke, NeurIPS 2020, theorem 4).

A sum of independent ones is nearly one of the added variances. For two of variances a²
and b², with c² = a² b² / (a² + b²), Poisson's summation formula shows each value's
probability to be within a factor of (1 + 2η)² or its inverse, η = 2 exp(-2 π² c²). From
`LEAST_STD` on, η is below 10^-38: not even a sum of 10^5 shares over 10^9 values could
be told from a single draw, if draws were exact.
"""

import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

# The smallest standard deviation of noise that is added to other noise.
LEAST_STD = 3.0
# Values drawn at once, so that they stay in a core's cache.
_BLOCK = 2**15
# By v - 1: 2^64 times the probability that a geometric number is v or more, e^-v.
_TAIL = np.exp(-np.arange(44, 0, -1.0)) * 2.0**64
_GEOMETRIC = _TAIL.astype(np.uint64)

Words = Callable[[int], NDArray[np.uint64]]


def entropy(count: int) -> NDArray[np.uint64]:
    """Return so many words of the operating system's cryptographic generator."""
    return np.frombuffer(os.urandom(8 * count), np.uint64)


def draw(std: float, count: int, words: Words = entropy) -> NDArray[np.int64]:
    """Draw independent values of a discrete Gaussian distribution.

    By rejection from a discrete Laplace distribution (Canonne, Kamath and Steinke,
    algorithms 2 and 3). Acceptance is computed in float64, from words of 64 bits: up to
    5 std each value has its probability to a relative 2^-48, and beyond, where one draw
    in a million falls, to an absolute 2^-64.

    Parameters
    ----------
    std : float
        The parameter, above 0: nearly the standard deviation.
    count : int
        Number of values.
    words : Callable
        Returns so many uniform words of 64 bits.

    Returns
    -------
    NDArray[np.int64]
        Shape (count,).
    """
    drawn = np.empty(count, np.int64)
    done = 0
    while done < count:
        # About four in ten are accepted.
        found = _accepted(std, min(_BLOCK, 3 * (count - done) + 16), words)
        found = found[: count - done]
        drawn[done : done + len(found)] = found
        done += len(found)
    return drawn


def _accepted(std: float, count: int, words: Words) -> NDArray[np.int64]:
    """Return what is accepted of so many proposals."""
    scale = int(std) + 1
    whole, tail, chance, sign = words(4 * count).reshape(4, count)
    # The words beyond the last multiple of the scale would favour small remainders.
    even = whole <= np.uint64(2**64 - 1 - 2**64 % scale)
    within = (whole % np.uint64(scale)).astype(np.float64)
    blocks = len(_GEOMETRIC) - np.searchsorted(_GEOMETRIC, tail, side="right")
    size = within + scale * blocks
    power = within / scale + (size - std * std / scale) ** 2 / (2 * std * std)
    is_negative = (sign & np.uint64(1)).astype(bool)
    taken = even & (chance * 2.0**-64 < np.exp(-power)) & ~(is_negative & (size == 0))
    values = np.where(is_negative, -size, size)[taken]
    return values.astype(np.int64)
