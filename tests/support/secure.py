"""Rounds of secure aggregation without nodes: members, letters, masked sums."""

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from slora_flwr.secure.graph import degree, link
from slora_flwr.secure.keys import PrivateKeys
from slora_flwr.secure.member import Member
from slora_flwr.secure.ring import FIGURES, Ring
from slora_flwr.secure.tally import Tally
from slora_flwr.secure.terms import Terms
from tests.support.runs import Config

# What turns a run of `make_config` into one with secure sums.
SECURE: Config = {
    "secure.aggregation": True,
    "secure.clip": 4.0,
    "clients.max-weight": 100,
    "clients.min-nodes": 2,
    "clients.min-replies": 2,
}
# What turns one into a run whose clients add noise.
SHARED: Config = {
    "secure.aggregation": True,
    "clients.min-nodes": 2,
    "clients.min-replies": 4,
    "privacy.trust": "sums",
    "privacy.noise-multiplier": 1.0,
    "privacy.clip-norm": 0.5,
    "privacy.delta": 0.01,
}


@dataclass
class Held:
    """A round under way, of members that each have a vector of whole numbers."""

    values: NDArray[np.int64]
    figures: NDArray[np.uint64]
    ring: Ring = field(default_factory=lambda: Ring(16))
    threshold: float = 0.66
    colluding: float = 0.05
    attempt: int = 1
    graph_seed: int = 0

    def __post_init__(self) -> None:
        count = len(self.values)
        terms = Terms(7, 3, self.attempt, self.threshold)
        keys = [PrivateKeys.generate() for _ in range(count)]
        public = [own.public for own in keys]
        each = degree(count, self.threshold, self.colluding)
        self.near = link(count, each, np.random.default_rng(self.graph_seed))
        width = self.values.shape[1], self.figures.shape[1]
        self.tally = Tally(terms, public, self.near, self.ring, *width)
        self.members = [
            Member(terms, i, keys[i], {j: public[j] for j in self.near[i]})
            for i in range(count)
        ]
        self.masked: dict[int, bytes] = {}

    def share(self, gone: Collection[int] = ()) -> "Held":
        for i, member in enumerate(self.members):
            if i not in gone:
                letters, commitment = member.letters(), member.commitment
                self.tally.took_letters(i, letters, commitment)
        return self

    def mask(self, gone: Collection[int] = ()) -> "Held":
        for i in sorted(self.tally.shared - {*gone}):
            # As on a node, between messages.
            self.members[i] = member = Member.unpack(self.members[i].pack())
            member.receive(self.tally.letters_to(i))
            values = self.values[i].astype(self.ring.dtype)
            figures = self.figures[i].astype(FIGURES)
            member.mask(values, figures)
            self.masked[i] = self.ring.pack(values) + figures.tobytes()
            self.tally.add(i, self.masked[i])
        self.tally.check()
        return self

    def tell(self, gone: Collection[int] = ()) -> "Held":
        for i in sorted(self.tally.alive - {*gone}):
            self.tally.took_shares(i, self.members[i].tell(*self.tally.asks(i)))
        return self


def draw(count: int, width: int, seed: int = 0, most: int = 300) -> Held:
    """Return a round of members with random numbers."""
    made = np.random.default_rng(seed)
    values = made.integers(-most, most + 1, (count, width))
    return Held(values, made.integers(0, 2**50, (count, 2), dtype=np.uint64))
