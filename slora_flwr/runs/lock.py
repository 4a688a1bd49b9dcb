"""Locks on files and folders, released when the holding process ends."""

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
    """Hold an exclusive lock on a file or folder.

    The kernel releases the lock if the process is killed. Child processes do not
    inherit it. It is advisory: code that does not ask for it can read and write.

    Parameters
    ----------
    path : Path
        An existing file or folder.
    refusal : str
        Error message if the lock is held already.

    Raises
    ------
    ConfigError
        If another process, or this one, holds the lock.
    """
    # NFS locks only files open for writing; a folder cannot be opened for writing.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        try:
            while not _lock(descriptor, fcntl.LOCK_EX):
                # `is_locked` shares the lock for an instant; whoever uses it does not.
                if not _lock(descriptor, fcntl.LOCK_SH):
                    raise ConfigError(refusal)
        except OSError as error:
            # Some network file systems have no locks. Most runs need none.
            log(WARNING, "%s cannot be locked against other runs (%s)", path, error)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def turns(path: Path) -> Iterator[None]:
    """Wait for an exclusive lock on a file, and hold it; the file is made if missing.

    The kernel releases the lock if the process is killed.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Return whether a process has sole use of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return not _lock(descriptor, fcntl.LOCK_SH)
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    """Return whether a lock could be had at once, in place of one held before."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
