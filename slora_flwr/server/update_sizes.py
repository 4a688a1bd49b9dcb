"""The sizes of a phase's updates, and the bound on the next ones that follows."""

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

# Honest updates differ by less: clients of other data sizes, and nodes that answer with
# the mean of several clients.
TIMES = 1000
_KEPT = 1000


class UpdateSizes:
    """The sizes of the last updates of a phase.

    An update's size is the largest magnitude of its values; for a node of several
    clients, of their mean. The median cannot be moved far by a minority.
    """

    def __init__(self) -> None:
        self._found: deque[float] = deque(maxlen=_KEPT)

    def add(self, sizes: Iterable[float]) -> None:
        """Add the sizes of a round's updates; updates of zeros tell nothing."""
        self._found.extend(size for size in sizes if size > 0)

    @property
    def bound(self) -> float:
        """The largest size of the next updates; infinite before the first."""
        return TIMES * median(self._found) if self._found else math.inf
