"""Private, atomically written files below `$SLORA_HOME` (default `~/.slora`)."""

import os
import stat
from collections.abc import Callable
from logging import WARNING
from pathlib import Path
from uuid import uuid4

# Suffix of files that are not complete yet.
PART = ".part"


def expand(path: str | Path) -> Path:
    """Return a path with the home folder of its `~`; as it is if nobody has that."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # there is no such user
        return Path(path)


def home() -> Path:
    """Return the folder for runs and caches; it may not exist yet."""
    return Path(os.environ.get("SLORA_HOME") or "~/.slora").expanduser().absolute()


def below_assets(kind: str, name: str) -> Path | None:
    """Return the folder of a name below `$SLORA_ASSETS/<kind>`; None if there is none.

    Where the name has hyphens, the folder may have underscores.
    """
    if not (assets := os.environ.get("SLORA_ASSETS")):
        return None
    places = (Path(assets, kind, n) for n in (name, name.replace("-", "_")))
    return next(filter(os.path.isdir, places), None)


def cache_folder() -> Path:
    """Return the folder for reproducible files, and create it if missing."""
    folder = home() / "cache"
    make_folder(folder)
    return folder


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, accessible only to this user.

    Existing folders keep their modes.
    """
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


def make_private(folder: Path) -> None:
    """Restrict a folder and all files in it to this user."""
    try:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o700 if path.is_dir() else 0o600)
    except OSError as error:
        # Some file systems have no modes; the files are complete nevertheless.
        from flwr.common.logger import log  # it takes half a second

        log(WARNING, "%s may be open to others (%s)", folder, error)


def write_atomically(
    path: Path,
    data: bytes | Callable[[Path], object],
    *,
    durably: bool = False,
    mode: int = 0o600,
) -> None:
    """Write a file so that readers, and a crash, find all of it or nothing.

    A link is replaced by the file; what it leads to stays as it is.

    Parameters
    ----------
    path : Path
        The file.
    data : bytes or Callable
        Its content, or a function that writes it to a path.
    durably : bool
        Wait until the file is on the disk and survives a crash of the machine.
    mode : int
        The file's mode, less the umask. What is derived from private text is private.
    """
    part = path.with_name(f"{path.name}.{uuid4().hex}{PART}")
    try:
        part.touch(mode=mode)
        if callable(data):
            data(part)
        else:
            part.write_bytes(data)
        if durably:
            sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # the disk may be full
    if durably:
        sync(path.parent)


def read_regular(path: Path) -> bytes:
    """Return the content of a file.

    Raises
    ------
    OSError
        If it is a folder, or a pipe or device, which may have no end; or if it cannot
        be read.
    """
    # Without O_NONBLOCK, opening a pipe waits for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is not a regular file")
        return file.read()


def append(path: Path, text: str) -> None:
    """Append a text to a file: all of it or, if that fails, nothing.

    A missing file is created, accessible only to this user.
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


def run_folder(lineage: int) -> Path:
    """Return the folder of what a run keeps on this machine; it may not exist.

    It is removed when the run ends. No two runs share one.
    """
    return cache_folder() / f"run-{lineage:d}"
