"""What goes wrong in writing a run directory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from slora_flwr.runs.checkpoint_files import list_checkpoints


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
        goes_on = "it holds no checkpoint, so the run must start again"
        if list_checkpoints(path):
            goes_on = "once it can, run.resume continues from its last checkpoint"
        raise RunDirectoryError(
            f"the run directory {path} cannot be written ({error}); {goes_on}"
        ) from error
