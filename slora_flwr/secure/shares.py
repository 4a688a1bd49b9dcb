"""Shamir shares of secrets, and how they travel to their holders."""

import os
from collections.abc import Mapping

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from slora_flwr.secure.errors import SecureError
from slora_flwr.secure.field import Curve, evaluate, read_pair, write_pair

SECRET_SIZE = 32
_NONCE_SIZE, _TAG_SIZE = 12, 16


def split(secret: bytes, needed: int, holders: int) -> list[bytes]:
    """Return shares of a secret of 32 bytes, 32 bytes each, in the holders' order.

    Any `needed` of them, two at least, recover it, and fewer tell nothing of it
    (Shamir 1979). Each half of the secret is shared by itself, over GF(2^128).
    """
    drawn = [os.urandom(SECRET_SIZE) for _ in range(needed - 1)]
    coefficients = [*map(read_pair, drawn), read_pair(secret)]
    return [write_pair(evaluate(coefficients, i + 1)) for i in range(holders)]


class Shared:
    """What some shares have in common: the secret, and each other share of it.

    Parameters
    ----------
    shares : Mapping[int, bytes]
        As many as are needed, by their holders' places from 0.

    Attributes
    ----------
    secret : bytes
        The secret.
    """

    def __init__(self, shares: Mapping[int, bytes]) -> None:
        places = [place + 1 for place in shares]
        self._curve = Curve(places, map(read_pair, shares.values()))
        self.secret = write_pair(self._curve.at(0))

    def share(self, place: int) -> bytes:
        """Return the share of the holder at a place."""
        return write_pair(self._curve.at(place + 1))


def join(shares: Mapping[int, bytes], needed: int) -> bytes:
    """Return the secret of some shares, by their holders' places from 0.

    Raises
    ------
    SecureError
        If there are fewer than needed, or one has another size.
    """
    if len(shares) < needed:
        raise SecureError(f"{len(shares)} shares of a secret; needed: {needed}")
    if any(len(share) != SECRET_SIZE for share in shares.values()):
        raise SecureError(f"a share has another size than {SECRET_SIZE} bytes")
    return Shared(dict(sorted(shares.items())[:needed])).secret


def seal(plain: bytes, key: bytes, label: bytes) -> bytes:
    """Return bytes that only the holder of a key can read or change, AES-256-GCM.

    Parameters
    ----------
    plain : bytes
        What is sealed.
    key : bytes
        32 bytes.
    label : bytes
        What the bytes are for; they open with the same one alone.
    """
    nonce = os.urandom(_NONCE_SIZE)
    return nonce + AESGCM(key).encrypt(nonce, plain, label)


def unseal(sealed: bytes, key: bytes, label: bytes) -> bytes:
    """Return what was sealed.

    Raises
    ------
    SecureError
        If it was not sealed with this key and label, or was changed since.
    """
    try:
        return AESGCM(key).decrypt(sealed[:_NONCE_SIZE], sealed[_NONCE_SIZE:], label)
    except (InvalidTag, ValueError) as error:
        raise SecureError("a sealed share was forged, changed or cut") from error


def sealed_size(plain: int) -> int:
    """Return how many bytes so many become as they are sealed."""
    return _NONCE_SIZE + plain + _TAG_SIZE
