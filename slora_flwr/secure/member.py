"""A member of a round: its secrets, what it masks, and what it tells of others."""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from slora_flwr.secure.errors import SecureError
from slora_flwr.secure.keys import KEY_SIZE, Pairing, PrivateKeys, PublicKeys
from slora_flwr.secure.masks import add_mask
from slora_flwr.secure.shares import SECRET_SIZE, seal, split, unseal
from slora_flwr.secure.terms import Terms

MASKING, SEALING = "mask", "share"


def commit(seed: bytes, terms: Terms, member: int) -> bytes:
    """Return what shows later whether a seed is the one that a member had."""
    label = terms.label("seed", _number(member))
    return hashlib.sha256(label + seed).digest()


def sign_of(member: int, other: int) -> int:
    """Return with which sign a member adds the mask that it has with another."""
    return 1 if member < other else -1


def letter_label(terms: Terms, sender: int, receiver: int) -> bytes:
    """Return what a sealed pair of shares is for."""
    return terms.label("letter", _number(sender), _number(receiver))


@dataclass
class Member:
    """One node's part in one attempt at a round.

    It shares its two secrets, masks once, and tells once. A message that would have it
    do more is refused.

    Attributes
    ----------
    terms : Terms
        The attempt.
    number : int
        The member's number in it.
    keys : PrivateKeys
        Its keys, used for nothing else.
    peers : dict[int, PublicKeys]
        Its neighbours' keys, by number.
    seed : bytes
        The key of its self-mask, 32 bytes.
    held : dict[int, tuple[bytes, bytes]]
        By whose they are, shares of a mask key and of a seed; its own among them.
    has_masked : bool
        True once it has masked values.
    """

    terms: Terms
    number: int
    keys: PrivateKeys
    peers: dict[int, PublicKeys]
    seed: bytes = field(default_factory=lambda: os.urandom(SECRET_SIZE))
    held: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    has_masked: bool = False

    def __post_init__(self) -> None:
        shown = [self.keys.public, *self.peers.values()]
        keys = {key for own in shown for key in (own.seal, own.mask)}
        if self.number in self.peers or len(keys) != 2 * len(shown):
            raise SecureError("members share a number or a key")
        if not self.peers:
            raise SecureError("a sum of one member would be that member's values")

    @property
    def needed(self) -> int:
        """How many of its holders recover one of its secrets."""
        return self.terms.needed(len(self.peers) + 1)

    @property
    def commitment(self) -> bytes:
        """What shows later whether a recovered seed is its own."""
        return commit(self.seed, self.terms, self.number)

    def letters(self) -> dict[int, bytes]:
        """Return a sealed pair of shares for each neighbour, and keep its own pair."""
        holders = sorted((self.number, *self.peers))
        shared = [
            split(secret, self.needed, len(holders))
            for secret in (self.keys.mask, self.seed)
        ]
        pairs = dict(zip(holders, zip(*shared, strict=True), strict=True))
        self.held = {self.number: pairs.pop(self.number)}
        pairing = Pairing(self.keys.seal)
        return {
            other: seal(
                b"".join(pair),
                self._sealing_key(pairing, other),
                letter_label(self.terms, self.number, other),
            )
            for other, pair in pairs.items()
        }

    def receive(self, letters: Mapping[int, bytes]) -> None:
        """Open the letters of those neighbours that shared; mask with no others.

        Raises
        ------
        SecureError
            If a letter is from nobody that it knows, or is not as it was sent; or if
            too few neighbours shared to recover its own secrets.
        """
        pairing = Pairing(self.keys.seal)
        for other, letter in letters.items():
            if other not in self.peers:
                raise SecureError(f"member {other} is no neighbour of {self.number}")
            label = letter_label(self.terms, other, self.number)
            plain = unseal(letter, self._sealing_key(pairing, other), label)
            if len(plain) != 2 * SECRET_SIZE:
                raise SecureError(f"member {other} sent shares of {len(plain)} bytes")
            self.held[other] = plain[:SECRET_SIZE], plain[SECRET_SIZE:]
        if len(self.held) < self.needed:
            raise SecureError(
                f"{len(self.held)} members shared with each other; needed: "
                f"{self.needed}"
            )

    def mask(self, *arrays: NDArray[np.unsignedinteger], about: bytes = b"") -> None:
        """Add its masks to numbers of the ring, in place.

        Parameters
        ----------
        arrays : NDArray
            The numbers.
        about : bytes
            What they were made from. Masks of members who differ in it do not cancel,
            so a server that gives one member something of its own learns no sum.

        Raises
        ------
        SecureError
            If it has masked before: the difference of two would show.
        """
        if self.has_masked or len(self.held) < 2:
            raise SecureError("a member masks once, after it has received shares")
        self.has_masked = True
        add_mask(arrays, self_mask_key(self.seed), 1)
        pairing = Pairing(self.keys.mask)
        for other in self.held.keys() - {self.number}:
            public = self.peers[other].mask
            key = pairing.agree(public, self.terms, MASKING, about)
            add_mask(arrays, key, sign_of(self.number, other))

    def tell(self, alive: Collection[int], dead: Collection[int]) -> dict[int, bytes]:
        """Return its shares of the seeds of some and of the mask keys of others.

        Parameters
        ----------
        alive, dead : Collection[int]
            Those whose masked values are in the sum, itself among them, and those who
            shared and whose values are missing.

        Raises
        ------
        SecureError
            If it is asked for both secrets of one member, or too few are in the sum.
        """
        if both := {*alive} & {*dead}:
            raise SecureError(f"asked for both secrets of {sorted(both)}")
        if {*alive} | {*dead} != self.held.keys() or self.number not in alive:
            raise SecureError(
                f"asked of members {sorted({*alive, *dead})}; it holds shares of "
                f"{sorted(self.held)}, and is in the sum itself"
            )
        if not self.has_masked or len({*alive}) < self.needed:
            raise SecureError(
                f"{len({*alive})} of its holders are in the sum; needed: {self.needed}"
            )
        return {other: self.held[other][other in alive] for other in self.held}

    def pack(self) -> bytes:
        """Return all that it knows."""
        facts = {
            "run": self.terms.run,
            "server_round": self.terms.server_round,
            "attempt": self.terms.attempt,
            "threshold": self.terms.threshold,
            "number": self.number,
            "keys": [self.keys.seal.hex(), self.keys.mask.hex()],
            "peers": [[n, keys.pack().hex()] for n, keys in self.peers.items()],
            "seed": self.seed.hex(),
            "held": [[n, *(s.hex() for s in pair)] for n, pair in self.held.items()],
            "has_masked": self.has_masked,
        }
        return json.dumps(facts).encode()

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Return the member that `pack` wrote."""
        read = bytes.fromhex
        facts: dict[str, Any] = json.loads(data)
        names = ("run", "server_round", "attempt", "threshold")
        return cls(
            Terms(*(facts[name] for name in names)),
            facts["number"],
            PrivateKeys(*map(read, facts["keys"])),
            {number: _known(read(keys)) for number, keys in facts["peers"]},
            read(facts["seed"]),
            {n: (read(first), read(second)) for n, first, second in facts["held"]},
            facts["has_masked"],
        )

    def _sealing_key(self, pairing: Pairing, other: int) -> bytes:
        return pairing.agree(self.peers[other].seal, self.terms, SEALING)


def self_mask_key(seed: bytes) -> bytes:
    """Return the key of the mask that a seed stands for."""
    return hashlib.sha256(b"slora-flwr self-mask" + seed).digest()


def _known(packed: bytes) -> PublicKeys:
    """Return public keys that were checked before they were packed."""
    return PublicKeys(packed[:KEY_SIZE], packed[KEY_SIZE:])


def _number(member: int) -> bytes:
    return member.to_bytes(8)
