"""The sizes of a phase's updates, and the bound on the next ones that follows."""

import math
from collections import deque
from collections.abc import Iterable
from statistics import median_low

from slora_flwr.runs.snapshot import Snapshot

# Honest updates differ by less: clients of other data sizes, and nodes that answer with
# the mean of several clients.
TIMES = 1000
_KEPT = 1000


class UpdateSizes:
    """The sizes of the last updates of a phase.

    An update's size is the largest magnitude of its values. A node of several clients
    counts once, with that of their mean, or with the largest if it sends them apart.

    The median cannot be moved far by a minority. Half of the nodes are none: of an even
    number of sizes the lower one in the middle counts, so that one of two nodes cannot
    spoil the state. It can keep the other out by sending smaller updates.
    """

    def __init__(self) -> None:
        self._found: deque[float] = deque(maxlen=_KEPT)

    def add(self, sizes: Iterable[float]) -> None:
        """Add the sizes of a round's updates; updates of zeros tell nothing."""
        self._found.extend(size for size in sizes if size > 0)

    @property
    def bound(self) -> float:
        """The largest size of the next updates; infinite before the first."""
        return TIMES * median_low(self._found) if self._found else math.inf

    def snapshot(self) -> Snapshot:
        """Return a snapshot for `restore`."""
        return Snapshot({"found": [*self._found]})

    def restore(self, snapshot: Snapshot) -> None:
        """Restore the sizes in a snapshot."""
        self._found.extend(snapshot.facts["found"])
