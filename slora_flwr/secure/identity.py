"""Long-lived keys of nodes, by which they know each other's keys of a round.

A node signs the public keys that it makes for a run's rounds, and whoever has a list of
the nodes that it trusts checks who signed. Keys that a server made up, or took from
another node or run, then show. Signatures are those of the nodes' OpenSSH keys: ECDSA
with SHA-256 (FIPS 186-5), or Ed25519 (RFC 8032).
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Self

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from slora_flwr.secure.errors import SecureError
from slora_flwr.secure.keys import KEY_SIZE, PublicKeys

_PUBLIC_SIZE = 2 * KEY_SIZE
# Who signed: the SHA-256 of their public key.
_NAME_SIZE = 32
# The longest signature, of a P-521 key, has 139 bytes.
_MOST_SIGNATURE = 160

# Types of public keys. Certificates and keys of tokens are others.
_TYPES = ("ssh-ed25519", *(f"ecdsa-sha2-nistp{bits}" for bits in (256, 384, 521)))

_PrivateKey = EllipticCurvePrivateKey | Ed25519PrivateKey
_PublicKey = EllipticCurvePublicKey | Ed25519PublicKey


@dataclass(frozen=True)
class ShownKeys:
    """What a node shows of its keys of a round, and perhaps who it is.

    Attributes
    ----------
    public : PublicKeys
        The keys.
    signer : bytes
        The SHA-256 of the public key of who signed, 32 bytes; empty without signature.
    signature : bytes
        The signature.
    """

    public: PublicKeys
    signer: bytes = b""
    signature: bytes = b""

    def pack(self) -> bytes:
        """Return them as bytes."""
        return self.public.pack() + self.signer + self.signature

    @classmethod
    def unpack(cls, data: object) -> Self:
        """Return them from their bytes; the signature is not checked.

        Raises
        ------
        SecureError
            If it is something else, or no honest node can have such keys.
        """
        if type(data) is not bytes:
            raise SecureError("its public keys are not bytes")
        public, rest = PublicKeys.unpack(data[:_PUBLIC_SIZE]), data[_PUBLIC_SIZE:]
        signer, signature = rest[:_NAME_SIZE], rest[_NAME_SIZE:]
        if rest and not 0 < len(signature) <= _MOST_SIGNATURE:
            raise SecureError(f"the signature of its keys has {len(rest)} bytes")
        return cls(public, signer, signature)


class Identity:
    """A node's own key.

    Parameters
    ----------
    private : bytes
        An OpenSSH private key without a passphrase.

    Raises
    ------
    ValueError
        If it is no such key, or of a kind that is not supported.
    """

    def __init__(self, private: bytes) -> None:
        try:
            key = load_ssh_private_key(private, None)
        except (TypeError, UnsupportedAlgorithm) as error:  # such as a passphrase
            raise ValueError(str(error)) from error
        if not isinstance(key, _PrivateKey):
            raise ValueError("it is neither ECDSA nor Ed25519")
        self._key = key
        self.name = name_of(key.public_key())

    def show(self, public: PublicKeys, run: int) -> ShownKeys:
        """Return keys of a round with this node's signature for a run."""
        told = _statement(public, run)
        if isinstance(self._key, Ed25519PrivateKey):
            signature = self._key.sign(told)
        else:
            signature = self._key.sign(told, ECDSA(SHA256()))
        return ShownKeys(public, self.name, signature)


class Peers:
    """The nodes with which one shares sums, by their public keys.

    Parameters
    ----------
    lines : Iterable[str]
        OpenSSH public keys, such as `ecdsa-sha2-nistp384 AAAA… comment`.

    Raises
    ------
    ValueError
        If one is no such key, or of a kind that is not supported; names the line.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self._keys: dict[bytes, _PublicKey] = {}
        for number, line in enumerate(lines, start=1):
            if line.split(" ")[0] not in _TYPES or "\n" in line.strip():
                known = ", ".join(_TYPES)
                raise ValueError(f"key {number} is none of {known}, in one line")
            try:
                key = load_ssh_public_key(line.encode())
            except (ValueError, UnsupportedAlgorithm) as error:
                raise ValueError(f"key {number} is no public key: {error}") from error
            assert isinstance(key, _PublicKey)  # by its type
            self._keys[name_of(key)] = key

    def check(
        self, neighbours: Mapping[int, ShownKeys], run: int, own: Collection[bytes]
    ) -> None:
        """Check that each neighbour's keys are those of another trusted node.

        Parameters
        ----------
        neighbours : Mapping[int, ShownKeys]
            What neighbours show, by their numbers.
        run : int
            Flower's run id.
        own : Collection[bytes]
            Names that are this node's own.

        Raises
        ------
        SecureError
            If one is signed by nobody who is trusted, or two by the same.
        """
        seen = {*own}
        for number, shown in sorted(neighbours.items()):
            key = self._keys.get(shown.signer)
            if key is None:
                raise SecureError(f"keys of member {number} are of no trusted peer")
            if shown.signer in seen:
                raise SecureError(f"keys of member {number} are of a peer twice")
            seen.add(shown.signer)
            told = _statement(shown.public, run)
            try:
                if isinstance(key, Ed25519PublicKey):
                    key.verify(shown.signature, told)
                else:
                    key.verify(shown.signature, told, ECDSA(SHA256()))
            except InvalidSignature:
                who = f"keys of member {number}"
                raise SecureError(f"{who} are not signed by whom they name") from None


def name_of(key: _PublicKey) -> bytes:
    """Return the SHA-256 of a public key in OpenSSH's format, without a comment."""
    return sha256(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)).digest()


def _statement(public: PublicKeys, run: int) -> bytes:
    """Return what a node signs: keys, in which run, and what they are for."""
    return f"slora-flwr secure sums, run {run}: ".encode() + public.pack()
