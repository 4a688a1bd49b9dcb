"""The digest of this package's code, by which server and nodes compare theirs."""

from functools import cache
from hashlib import blake2b
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


@cache
def code_digest(others: tuple[Path, ...] = ()) -> str:
    """Return the BLAKE2b digest of this package's source files and others, 32 hex."""
    digest = blake2b(digest_size=16)
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode())
        digest.update(path.read_bytes())
    for path in others:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
