"""Locks on files and folders, which end with the process that holds them."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from logging import WARNING
from pathlib import Path

from flwr.common.logger import log

from slora_flwr.config import ConfigError


@contextmanager
def sole_use(path: Path, refusal: str) -> Iterator[None]:
    """Keep out whoever asks for the sole use of the same file or folder.

    The kernel holds the lock, so that it goes with a process that is killed. Programs
    that the process starts do not get it. Who does not ask may read, and write too.

    Parameters
    ----------
    path : Path
        It must be there.
    refusal : str
        What is said to those kept out.

    Raises
    ------
    ConfigError
        If it is in use, by another process or by this one.
    """
    # NFS locks only what is open for writing, which a folder cannot be.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(refusal) from error
        except OSError as error:
            # Some network file systems have no locks. Most runs are alone anyway.
            log(WARNING, "%s has no lock against others (%s)", path, error)
        yield
    finally:
        os.close(descriptor)
