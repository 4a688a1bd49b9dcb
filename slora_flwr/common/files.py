"""Where files outlive a process: `$SLORA_HOME`, by default `~/.slora`."""

import os
from logging import WARNING
from pathlib import Path
from uuid import uuid4

from flwr.common.logger import log

# Ends the names of files that are not whole yet.
PART = ".part"


def home() -> Path:
    """Give the folder for runs and caches; it may not exist yet."""
    return Path(os.environ.get("SLORA_HOME") or "~/.slora").expanduser().absolute()


def cache_folder() -> Path:
    """Give the folder for what can be made again, and make it."""
    folder = home() / "cache"
    make_folder(folder)
    return folder


def make_folder(path: Path) -> None:
    """Make a folder that only this user can open, and so those missing above it.

    One that is there already is left as it is.
    """
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


def make_private(folder: Path) -> None:
    """Let only this user open a folder and what other libraries wrote to it."""
    try:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o700 if path.is_dir() else 0o600)
    except OSError as error:
        # Some file systems have no modes; what was written is whole all the same.
        log(WARNING, "%s may be open to others (%s)", folder, error)


def write_atomically(path: Path, data: bytes, *, durably: bool = False) -> None:
    """Write a file so that a reader, or a crash, sees all of it or nothing.

    Parameters
    ----------
    path : Path
        The file.
    data : bytes
        All that it is to hold.
    durably : bool
        Return once it is on the disk, where a crash of the machine does not reach it.
    """
    part = path.with_name(f"{path.name}.{uuid4().hex}{PART}")
    try:
        part.touch(mode=0o600)  # what comes of private text is private
        part.write_bytes(data)
        if durably:
            sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # a full disk needs the room
    if durably:
        sync(path.parent)


def append(path: Path, text: str) -> None:
    """Append all of a text to a file or, if that fails, nothing.

    A file that is not there is made, for this user alone.
    """
    data = text.encode()
    with open(path, "ab", buffering=0, opener=_private) as file:
        size = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(size)
            raise


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def residuals_folder(lineage: int) -> Path:
    """Give the folder of a run's residuals on this machine; it may not exist."""
    return cache_folder() / f"residuals-{lineage:d}"
