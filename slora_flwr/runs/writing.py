"""What goes wrong in writing a run directory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class RunDirectoryError(RuntimeError):
    """The run directory cannot be written: the disk is full, or it is read-only."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the run directory in errors about writing to it.

    Raises
    ------
    RunDirectoryError
        In place of what the operating system or safetensors raises.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunDirectoryError(
            f"the run directory {path} cannot be written ({error}); once it can, "
            "run.resume continues from its last checkpoint"
        ) from error
