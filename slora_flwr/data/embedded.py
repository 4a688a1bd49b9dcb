"""The data sets that come with the running Python, read once and kept in files."""

import json
import sys
from collections.abc import Callable
from hashlib import blake2b

from slora_flwr.common.code_digest import code_digest
from slora_flwr.data import stdlib_docs, stdlib_summaries
from slora_flwr.data.kept import keep
from slora_flwr.data.shared_files import Table

Columns = dict[str, list[str]]
_SETS: dict[str, Callable[[], Columns]] = {
    "stdlib-docs": stdlib_docs.load,
    "stdlib-summaries": stdlib_summaries.load,
}


def read_embedded(name: str) -> Table:
    """Return a data set of the running Python's standard library.

    Parameters
    ----------
    name : str
        `stdlib-docs` or `stdlib-summaries`.

    Raises
    ------
    ConfigError
        If the cache, which all runs on this machine share, cannot be written.
    """
    file = f"{name}-{_digest()}.json"
    kept = keep(file, lambda: json.dumps(_SETS[name]()).encode())
    columns = json.loads(kept)
    return Table([*columns], columns)


def _digest() -> str:
    """Return 32 hex digits that change with the library's files or with this code."""
    digest = blake2b(f"{sys.version} {code_digest()}".encode(), digest_size=16)
    for path, _ in stdlib_docs.modules(stdlib_docs.root()):
        found = path.stat()
        digest.update(f"{path} {found.st_size} {found.st_mtime_ns}".encode())
    return digest.hexdigest()
