"""Who masks with whom: all with all, or each with some of many."""

import math
from collections.abc import Sequence

import numpy as np

# Up to so many members each masks with all others.
COMPLETE = 30
# The chance that a graph protects somebody less.
_UNSAFE = 2.0**-40


def degree(members: int, threshold: float, colluding: float) -> int:
    """Return with how many others each member masks.

    Parameters
    ----------
    members : int
        Number of members of the round.
    threshold : float
        As in `Terms`.
    colluding : float
        The share of the members that an honest one cannot count on: they help the
        server, or drop out.

    Notes
    -----
    The graph of Bell et al. (CCS 2020, section 4): members in random order on a circle,
    each with its nearest. By the union bound over members, with probability 2^-40 at
    most

    - a member's colluding neighbours are so many that, with the two halves of its other
      holders told different things, both of its secrets come out: with h holders of
      whom t are needed, from 2t - h colluding ones on;
    - the honest ones fall apart: so many colluding ones side by side on the circle that
      no edge spans them, twice.
    """
    if members <= COMPLETE:
        return members - 1
    from scipy.stats import hypergeom  # it takes a second

    bad = math.ceil(colluding * members)
    for half in range(1, members // 2):
        holders = 2 * half + 1
        needed = math.floor(threshold * holders) + 1
        # Of a member's neighbours, drawn from all others.
        split = hypergeom.sf(2 * needed - holders - 1, members - 1, bad, 2 * half)
        apart = (bad / members) ** half
        if members * (split + apart) <= _UNSAFE:
            return 2 * half
    return members - 1


def link(members: int, each: int, stream: np.random.Generator) -> list[Sequence[int]]:
    """Return each member's neighbours, ascending, of a random graph.

    Parameters
    ----------
    members : int
        Their number; they are called 0, 1, 2…
    each : int
        The number of neighbours of each, even or `members - 1`.
    stream : numpy.random.Generator
        Draws the order on the circle.
    """
    if each >= members - 1:
        return [[j for j in range(members) if j != i] for i in range(members)]
    order = stream.permutation(members).tolist()
    found: list[Sequence[int]] = [[]] * members
    for place, member in enumerate(order):
        steps = (*range(-each // 2, 0), *range(1, each // 2 + 1))
        found[member] = sorted(order[(place + step) % members] for step in steps)
    return found
