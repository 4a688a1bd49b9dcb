"""The server's side of a round: masked values are added up, and their sum is opened."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import combinations, islice

import numpy as np
from numpy.typing import NDArray

from slora_flwr.secure.errors import SecureError
from slora_flwr.secure.keys import Pairing, PublicKeys, is_private
from slora_flwr.secure.masks import add_mask
from slora_flwr.secure.member import MASKING, commit, self_mask_key, sign_of
from slora_flwr.secure.ring import FIGURES, Ring
from slora_flwr.secure.shares import SECRET_SIZE, Shared, join, sealed_size
from slora_flwr.secure.terms import Terms

# How many sets of shares are tried for one that recovers a secret: a forger among the
# first holders spoils many.
_MOST_TRIES = 1000


class Tally:
    """The sum of one attempt at a round, which nobody can read before it is opened.

    Parameters
    ----------
    terms : Terms
        The attempt.
    members : Sequence[PublicKeys]
        The members' keys, by number.
    neighbours : Sequence[Sequence[int]]
        Each member's neighbours.
    ring : Ring
        Where values are summed.
    count, figures : int
        How many values a member sends, and how many figures beside them.

    Attributes
    ----------
    about : bytes
        What the members' values are made from; see `Member.mask`.
    shared : set[int]
        Those whose shares are with their neighbours.
    alive : set[int]
        Those whose masked values are in the sum.
    forgers : set[int]
        Those who told wrong shares, as far as it showed.
    """

    def __init__(
        self,
        terms: Terms,
        members: Sequence[PublicKeys],
        neighbours: Sequence[Sequence[int]],
        ring: Ring,
        count: int,
        figures: int,
    ) -> None:
        self.about = b""
        self.shared: set[int] = set()
        self.alive: set[int] = set()
        self.forgers: set[int] = set()
        self._terms, self._members, self._near = terms, members, neighbours
        self._ring = ring
        self._sums = ring.zeros(count)
        self._figures = np.zeros(figures, FIGURES)
        self._letters: dict[int, Mapping[int, bytes]] = {}
        self._commitments: dict[int, bytes] = {}
        self._told: dict[int, Mapping[int, bytes]] = {}

    @property
    def size(self) -> int:
        """Bytes of a member's masked values and figures."""
        return len(self._sums) * self._ring.item_size + self._figures.nbytes

    def took_letters(
        self, member: int, letters: Mapping[int, bytes], commitment: bytes
    ) -> None:
        """Take a member's letters to its neighbours.

        Raises
        ------
        SecureError
            If they are not one for each neighbour, of the right size.
        """
        size = sealed_size(2 * SECRET_SIZE)
        if letters.keys() != {*self._near[member]}:
            raise SecureError(f"letters to {sorted(letters)}, not to its neighbours")
        if any(len(letter) != size for letter in letters.values()):
            raise SecureError(f"a letter has another size than {size} bytes")
        if len(commitment) != sha256().digest_size:
            raise SecureError(f"its commitment has {len(commitment)} bytes")
        self.shared.add(member)
        self._letters[member], self._commitments[member] = letters, commitment

    def settle(self) -> set[int]:
        """Leave out those whom too few of their holders could help; return them.

        Raises
        ------
        SecureError
            If fewer than two members are left.
        """
        alone: set[int] = set()
        while lacking := {
            member
            for member in self.shared
            if 1 + len([*self._around(member)]) < self._needed(member)
        }:
            alone |= lacking
            self.shared -= lacking
        if len(self.shared) < 2:
            raise SecureError(
                f"too few members shared: {len(self._letters)} of {len(self._members)}"
            )
        return alone

    def letters_to(self, member: int) -> dict[int, bytes]:
        """Return the letters to a member from those neighbours that shared."""
        return {other: self._letters[other][member] for other in self._around(member)}

    def add(self, member: int, masked: bytes) -> None:
        """Add a member's masked values and figures to the sum.

        Raises
        ------
        SecureError
            If it did not share, was added before, or sent another number of bytes; the
            sum is unchanged.
        """
        if member not in self.shared or member in self.alive:
            raise SecureError("its values are of no use here, or came before")
        if len(masked) != self.size:
            raise SecureError(f"{len(masked)} masked bytes, not {self.size}")
        cut = self.size - self._figures.nbytes
        values = self._ring.unpack(masked[:cut], len(self._sums))
        np.add(self._sums, values, out=self._sums)
        np.add(self._figures, np.frombuffer(masked[cut:], FIGURES), out=self._figures)
        self.alive.add(member)

    def check(self) -> None:
        """Check that the sum can be opened, before anybody is asked to tell anything.

        Raises
        ------
        SecureError
            If too few of a member's holders are in the sum, or it is of one member.
        """
        if len(self.alive) < 2:
            raise SecureError(
                f"{len(self.alive)} members are in the sum; needed: 2 at least, since "
                "a sum of one would be no secret"
            )
        for member in sorted(self.shared):
            there, needed = len(self._tellers(member)), self._needed(member)
            if there < needed:
                raise SecureError(
                    f"{there} of the {len(self._near[member]) + 1} members that hold "
                    f"member {member}'s secrets answered; needed: {needed}"
                )

    def asks(self, member: int) -> tuple[list[int], list[int]]:
        """Return of whom a member is to tell: those in the sum, and those missing."""
        around = {member, *self._around(member)}
        return sorted(around & self.alive), sorted(around - self.alive)

    def took_shares(self, member: int, shares: Mapping[int, bytes]) -> None:
        """Take the shares that a member tells.

        Raises
        ------
        SecureError
            If they are not those that it was asked for.
        """
        if shares.keys() != {member, *self._around(member)}:
            raise SecureError(f"shares of {sorted(shares)}, not of those asked for")
        if any(len(share) != SECRET_SIZE for share in shares.values()):
            raise SecureError("a share has another size")
        self._told[member] = shares

    def open(self) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Return the sum of the values, of least magnitude, and of the figures.

        Raises
        ------
        SecureError
            If too few told their shares, or what they told is not a member's secret.
        """
        for member in sorted(self.alive):
            seed = self._recover(member, self._is_seed_of)
            self._remove(self_mask_key(seed), 1)
        for member in sorted(self.shared - self.alive):
            pairing = Pairing(self._recover(member, self._is_key_of))
            for other in self._tellers(member):
                public = self._members[other].mask
                key = pairing.agree(public, self._terms, MASKING, self.about)
                self._remove(key, sign_of(other, member))
        return self._ring.centred(self._sums), self._figures

    def _around(self, member: int) -> Iterator[int]:
        """Yield a member's neighbours that shared."""
        return (other for other in self._near[member] if other in self.shared)

    def _tellers(self, member: int) -> list[int]:
        """Return the holders of a member's secrets that are in the sum, ascending."""
        holders = {member, *self._near[member]}
        return sorted(holders & self.alive)

    def _needed(self, member: int) -> int:
        return self._terms.needed(len(self._near[member]) + 1)

    def _is_seed_of(self, member: int, secret: bytes) -> bool:
        return commit(secret, self._terms, member) == self._commitments[member]

    def _is_key_of(self, member: int, secret: bytes) -> bool:
        return is_private(secret, self._members[member].mask)

    def _recover(self, member: int, is_right: Callable[[int, bytes], bool]) -> bytes:
        """Return a member's secret, from the shares of those who did not forge theirs.

        Forgers are noted.
        """
        holders = sorted((member, *self._near[member]))
        places = {h: i for i, h in enumerate(holders) if h in self._told}
        needed = self._needed(member)
        told = {place: self._told[h][member] for h, place in places.items()}
        if len(told) < needed:
            raise SecureError(
                f"{len(told)} members told shares of member {member}'s secret; needed: "
                f"{needed}"
            )
        for tried in islice(combinations(places.values(), needed), _MOST_TRIES):
            shared = Shared({place: told[place] for place in tried})
            if is_right(member, shared.secret):
                kept = {place: told[place] for place in tried[1:]}
                for holder, place in places.items():
                    if place in tried or shared.share(place) == told[place]:
                        continue
                    other = join(kept | {place: told[place]}, needed)
                    if not is_right(member, other):
                        self.forgers.add(holder)
                return shared.secret
        raise SecureError(f"too many shares of member {member}'s secret are forged")

    def _remove(self, key: bytes, sign: int) -> None:
        add_mask((self._sums, self._figures), key, -sign)
