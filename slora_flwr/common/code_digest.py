"""The digest of this package's code, by which server and nodes compare theirs."""

from functools import cache
from hashlib import blake2b
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


@cache
def code_digest(others: tuple[Path, ...] = ()) -> str:
    """Return 32 hex digits: BLAKE2b of this package's code and other files."""
    digest = blake2b(digest_size=16)
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode())
        digest.update(path.read_bytes())
    for path in others:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
