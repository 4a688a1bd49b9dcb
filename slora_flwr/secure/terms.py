"""What the members of a round agree on, to which all of its keys are bound."""

import math
from dataclasses import dataclass

_PROTOCOL = b"slora-flwr secure aggregation 1"


@dataclass(frozen=True)
class Terms:
    """The terms of one attempt at a round.

    Attributes
    ----------
    run : int
        Names the run, from 0 to 2^64 - 1.
    server_round : int
        The round, from 1.
    attempt : int
        The attempt at it, from 1.
    threshold : float
        The share of the holders of a secret that must give their shares of it to
        recover it, from 0.5 below 1.
    """

    run: int
    server_round: int
    attempt: int
    threshold: float

    def label(self, purpose: str, *parts: bytes) -> bytes:
        """Return what separates one use of a key from all others."""
        numbers = (self.run, self.server_round, self.attempt)
        fields = [_PROTOCOL, purpose.encode(), *(n.to_bytes(8) for n in numbers)]
        # With lengths, so that no two sequences of fields run together to the same.
        return b"".join(len(f).to_bytes(4) + f for f in (*fields, *parts))

    def needed(self, holders: int) -> int:
        """Return how many of the holders of a secret recover it: more than half.

        No two groups of so many are apart, so a server that tells one group that a
        member is there and the other that it is gone never recovers both secrets of it,
        unless members help it.
        """
        return math.floor(self.threshold * holders) + 1
