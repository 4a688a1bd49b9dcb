"""Key pairs of one round, and the secrets that two members derive from them."""

from dataclasses import dataclass
from typing import Self

from cryptography.hazmat.primitives.asymmetric.x25519 import (
    X25519PrivateKey,
    X25519PublicKey,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from slora_flwr.secure.errors import SecureError
from slora_flwr.secure.terms import Terms

KEY_SIZE = 32


@dataclass(frozen=True)
class PublicKeys:
    """What a member shows of its keys: X25519 public keys, 32 bytes each.

    Attributes
    ----------
    seal : bytes
        Seals shares on their way to it.
    mask : bytes
        Gives the masks that it has in common with others.
    """

    seal: bytes
    mask: bytes

    def pack(self) -> bytes:
        """Return both, 64 bytes."""
        return self.seal + self.mask

    @classmethod
    def unpack(cls, data: object) -> Self:
        """Return the keys in 64 bytes.

        Raises
        ------
        SecureError
            If it is something else, or no honest member can have such keys.
        """
        if type(data) is not bytes or len(data) != 2 * KEY_SIZE:
            raise SecureError("its public keys are not 64 bytes")
        keys = cls(data[:KEY_SIZE], data[KEY_SIZE:])
        if keys.seal == keys.mask:
            raise SecureError("its public keys are one")
        for key in (keys.seal, keys.mask):
            _exchange(_ANY, key)
        return keys


@dataclass(frozen=True, repr=False)
class PrivateKeys:
    """A member's keys, for one attempt at one round: X25519, 32 bytes each."""

    seal: bytes
    mask: bytes

    @classmethod
    def generate(cls) -> Self:
        """Return new keys."""
        return cls(*(X25519PrivateKey.generate().private_bytes_raw() for _ in "sm"))

    @property
    def public(self) -> PublicKeys:
        """What others may see."""
        return PublicKeys(public_of(self.seal), public_of(self.mask))


def public_of(private: bytes) -> bytes:
    """Return the public key of a private one."""
    key = X25519PrivateKey.from_private_bytes(private)
    return key.public_key().public_bytes_raw()


def is_private(private: bytes, public: bytes) -> bool:
    """Return whether bytes are the private key of a public one, as its owner made it.

    X25519 ignores five bits of a private key (RFC 7748, section 5). Those of a key that
    was made are set, so that no other bytes pass for it.
    """
    is_clamped = not private[0] & 7 and private[-1] >> 6 == 1
    return is_clamped and public_of(private) == public


class Pairing:
    """A private key, with which secrets are agreed on with many others.

    Parameters
    ----------
    private : bytes
        The key.
    """

    def __init__(self, private: bytes) -> None:
        self._private = X25519PrivateKey.from_private_bytes(private)
        self._public = self._private.public_key().public_bytes_raw()

    def agree(
        self, public: bytes, terms: Terms, purpose: str, about: bytes = b""
    ) -> bytes:
        """Return the secret in common with the holder of a public key; see `agree`."""
        shared = _exchange(self._private, public)
        info = terms.label(purpose, about, *sorted((self._public, public)))
        return HKDF(SHA256(), KEY_SIZE, salt=None, info=info).derive(shared)


def agree(
    private: bytes, public: bytes, terms: Terms, purpose: str, about: bytes = b""
) -> bytes:
    """Return the secret that two members have in common for a purpose, 32 bytes.

    X25519 (RFC 7748), then HKDF-SHA256 (RFC 5869) over the terms, the purpose, what it
    is about, and both public keys, in the same order on both sides.

    Raises
    ------
    SecureError
        If the public key is none that an honest member has.
    """
    return Pairing(private).agree(public, terms, purpose, about)


def _exchange(private: X25519PrivateKey, public: bytes) -> bytes:
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise SecureError(f"a public key is off: {error}") from error


# Keys of low order give no secret with any other, so not with this one.
_ANY = X25519PrivateKey.from_private_bytes(bytes(KEY_SIZE))
