"""The files of a run directory's checkpoints, known by their names alone."""

import re
from pathlib import Path

_NAME = re.compile(r"round-[0-9]+\.safetensors")


def checkpoint_path(directory: Path, number: int) -> Path:
    """Return the path of the checkpoint after a round."""
    return directory / "checkpoints" / f"round-{number:04d}.safetensors"


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the paths of a run directory's checkpoints by round, whole or not."""
    # Copies of other names, such as "round-0001 (copy)", are their owner's.
    found = (directory / "checkpoints").glob("round-*.safetensors")
    named = [path for path in found if _NAME.fullmatch(path.name) and path.is_file()]
    return sorted(named, key=number_of)


def number_of(path: Path) -> int:
    """Return the round after which a checkpoint was written."""
    return int(path.stem.removeprefix("round-"))
