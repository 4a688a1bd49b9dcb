"""Files of the cache: what is made of data once, and read by later processes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

from slora_flwr.common.files import (
    cache_folder,
    home,
    make_folder,
    read_regular,
    write_atomically,
)
from slora_flwr.config import ConfigError

# Bytes of the digest before the content.
_DIGEST = 32


def keep(name: str, make: Callable[[], bytes], folder: Path | None = None) -> bytes:
    """Return the content of a file, which is made if it is not there or is damaged.

    Parameters
    ----------
    name : str
        The file's name, which must change with all that its content follows from.
    make : Callable
        Returns the content.
    folder : Path or None
        Its folder; None for the cache, which all runs on this machine share.

    Raises
    ------
    ConfigError
        If it cannot be written.
    """
    with _writing():
        folder = folder or cache_folder()
        make_folder(folder)
        path = folder / name
    if path.is_file():
        kept = read_regular(path)
        if kept[:_DIGEST] == _digest(kept[_DIGEST:]):
            return kept[_DIGEST:]
    data = make()
    with _writing():
        write_atomically(path, _digest(data) + data)
    return data


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=_DIGEST).digest()


@contextmanager
def _writing() -> Iterator[None]:
    """Name `$SLORA_HOME` in errors about writing to the cache."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"$SLORA_HOME is {str(home())!r}; allowed: a folder that can be made and "
            f"written, with room for the data and its tokens ({error})"
        ) from error
