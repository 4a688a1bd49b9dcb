"""Signed keys of a round: who signed them is who they say, for this run alone."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from slora_flwr.secure.errors import SecureError
from slora_flwr.secure.identity import Identity, Peers, ShownKeys
from slora_flwr.secure.keys import PrivateKeys

RUN = 77
KINDS: dict[str, Callable[[], Any]] = {
    "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "P-521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
}


def made(kind: str = "P-384") -> tuple[Identity, str]:
    """Return an identity, and its public key as OpenSSH writes it."""
    key = KINDS[kind]()
    form = Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return Identity(key.private_bytes(*form)), f"{public.decode()} a hospital"


def shown(identity: Identity, run: int = RUN) -> ShownKeys:
    """Return new keys, as they are after they were sent."""
    keys = PrivateKeys.generate().public
    return ShownKeys.unpack(identity.show(keys, run).pack())


@pytest.mark.parametrize("kind", KINDS)
def test_a_peers_keys_are_accepted(kind: str) -> None:
    (one, line), (other, second) = made(kind), made()
    peers = Peers([line, second])
    peers.check({1: shown(one), 2: shown(other)}, RUN, [])


def test_what_a_server_may_try_is_refused() -> None:
    (own, own_line), (peer, line), (stranger, _) = made(), made(), made()
    peers = Peers([own_line, line])
    good, unsigned = shown(peer), ShownKeys(PrivateKeys.generate().public)
    swapped = ShownKeys(shown(stranger).public, good.signer, good.signature)
    named = ShownKeys(good.public, good.signer, shown(stranger).signature)
    for told, neighbours in (
        ("keys of member 1 are of no trusted peer", {1: unsigned}),
        ("keys of member 1 are of no trusted peer", {1: shown(stranger)}),
        ("keys of member 4 are not signed by whom they name", {4: swapped}),
        ("keys of member 1 are not signed by whom they name", {1: named}),
        # Of another run, in which the peer has perhaps lost its secrets.
        ("keys of member 1 are not signed by whom", {1: shown(peer, RUN + 1)}),
        # The same node in the place of two, and this node's own keys.
        ("keys of member 5 are of a peer twice", {2: good, 5: shown(peer)}),
        ("keys of member 2 are of a peer twice", {2: shown(own)}),
    ):
        with pytest.raises(SecureError, match=told):
            peers.check(neighbours, RUN, [own.name])
    peers.check({1: good}, RUN, [own.name])


def test_unsigned_keys_are_64_bytes_as_ever() -> None:
    keys = PrivateKeys.generate().public
    assert ShownKeys(keys).pack() == keys.pack()
    assert ShownKeys.unpack(keys.pack()) == ShownKeys(keys)


@pytest.mark.parametrize("size", [63, 65, 96, 64 + 32 + 161])
def test_odd_sizes_are_refused(size: int) -> None:
    keys = PrivateKeys.generate().public.pack()
    with pytest.raises(SecureError):
        ShownKeys.unpack((keys + bytes(200))[:size])


def test_keys_of_no_use_are_named() -> None:
    key = rsa.generate_private_key(65537, 2048)
    form = Encoding.PEM, PrivateFormat.OpenSSH
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    with pytest.raises(ValueError, match="neither ECDSA nor Ed25519"):
        Identity(key.private_bytes(*form, NoEncryption()))
    line = made()[1]
    certificate = line.replace("nistp384", "nistp384-cert-v01@openssh.com")
    for other in (public.decode(), certificate, f"sk-{line}", f"{line}\n{line}"):
        with pytest.raises(ValueError, match="key 2 is none of ssh-ed25519, ecdsa-"):
            Peers([line, other])
    with pytest.raises(ValueError, match="key 1 is no public key"):
        Peers(["ecdsa-sha2-nistp384 nonsense"])


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="there is no ssh-keygen")
def test_keys_of_ssh_keygen(tmp_path: Path) -> None:
    """As docker/certs.sh makes a node's."""
    path, locked = tmp_path / "key", tmp_path / "locked"
    for file, passphrase in ((path, ""), (locked, "secret")):
        command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-C", "bank-a"]
        subprocess.run([*command, "-N", passphrase, "-f", str(file)], check=True)
    identity = Identity(path.read_bytes())
    peers = Peers([path.with_suffix(".pub").read_text()])
    peers.check({3: shown(identity)}, RUN, [])
    with pytest.raises(ValueError, match=r"[Pp]assword|bcrypt"):
        Identity(locked.read_bytes())
