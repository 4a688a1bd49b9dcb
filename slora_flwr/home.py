"""Where files outlive a process: `$SLORA_HOME`, by default `~/.slora`."""

import os
from pathlib import Path
from uuid import uuid4


def home() -> Path:
    """Give the folder for runs and caches; it may not exist yet."""
    return Path(os.environ.get("SLORA_HOME") or "~/.slora").expanduser().absolute()


def cache_folder() -> Path:
    """Give the folder for what can be made again, and make it."""
    folder = home() / "cache"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees all of it or nothing."""
    part = path.with_name(f"{path.name}.{uuid4().hex}.part")
    part.touch(mode=0o600)  # what comes of private text is private
    part.write_bytes(data)
    part.replace(path)
