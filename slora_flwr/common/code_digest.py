"""Digests of code: of this package's, and of other files'."""

from collections.abc import Iterable
from functools import cache
from hashlib import blake2b
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


@cache
def code_digest() -> str:
    """Return 32 hex digits: BLAKE2b of this package's code.

    Processes that share a machine or a pool compare it. Server and nodes compare
    `slora_flwr.common.protocol.PROTOCOL`.
    """
    paths = sorted(_PACKAGE.rglob("*.py"))
    return _digest((path.relative_to(_PACKAGE).as_posix(), path) for path in paths)


@cache
def files_digest(paths: tuple[Path, ...]) -> str:
    """Return 32 hex digits: BLAKE2b of files and their names."""
    return _digest((path.name, path) for path in paths)


def _digest(files: Iterable[tuple[str, Path]]) -> str:
    digest = blake2b(digest_size=16)
    for name, path in files:
        digest.update(name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
