"""Files of the cache: what is made of data once, and read by later processes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from slora_flwr.common.files import cache_folder, home, make_folder, write_atomically
from slora_flwr.config import ConfigError


def keep(name: str, make: Callable[[], bytes], folder: Path | None = None) -> Path:
    """Return the path of a file, which is made if it is not there.

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
    if not path.is_file():
        data = make()
        with _writing():
            write_atomically(path, data)
    return path


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
