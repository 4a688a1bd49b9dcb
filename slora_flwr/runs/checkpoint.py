"""Checkpoints: what a run needs to go on after a round, bit for bit.

A checkpoint is one safetensors file, so that no crash leaves one half of it beside
another's. Its metadata hold the format, facts as JSON, and a digest of facts and
tensors, which shows damage that the format alone would not.
"""

import json
from collections.abc import Mapping
from hashlib import blake2b
from logging import WARNING
from pathlib import Path
from typing import Any

import numpy as np
from flwr.common.logger import log
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from slora_flwr.common.files import write_atomically
from slora_flwr.common.tensors import State
from slora_flwr.config import ConfigError, RunConfig, flatten
from slora_flwr.runs.events import EVENTS
from slora_flwr.runs.snapshot import Snapshot

FORMAT = "1"
# Files that a run goes on writing, cut back to what they held at the checkpoint.
GROWING = (EVENTS, "ledger.csv")
# What a run may go on with other values of: no update and no state depends on them.
FREE = (
    "run.dir",
    "run.resume",
    "run.keep",
    "run.target",
    "clients.min-nodes",
    "clients.deadline",
)


class DamagedError(ValueError):
    """A file that is not a whole checkpoint."""


def write_checkpoint(path: Path, snapshot: Snapshot) -> None:
    """Write a checkpoint, all of it or nothing, and to the disk."""
    # The file orders tensors by its own rules.
    facts = json.dumps({"facts": snapshot.facts, "tensors": list(snapshot.tensors)})
    tensors = {
        name: t.detach().cpu().contiguous() for name, t in snapshot.tensors.items()
    }
    digest = _digest(facts, tensors)
    metadata = {"format": FORMAT, "facts": facts, "digest": digest}
    write_atomically(path, save(tensors, metadata), durably=True)


def read_checkpoint(path: Path) -> Snapshot:
    """Read a checkpoint.

    Raises
    ------
    DamagedError
        If it is not what was written.
    ConfigError
        If it is of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            format_ = metadata["format"]
            if format_ == FORMAT:
                facts = json.loads(metadata["facts"])
                # The file may go while they are in use.
                tensors = {n: file.get_tensor(n).clone() for n in facts["tensors"]}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DamagedError(f"{type(error).__name__}: {error}") from error
    if format_ != FORMAT:
        raise ConfigError(
            f"checkpoint {path} is of format {format_}; allowed: {FORMAT}, that of "
            "this version of slora-flwr"
        )
    if _digest(metadata["facts"], tensors) != metadata.get("digest"):
        raise DamagedError("what it holds does not have its digest")
    return Snapshot(facts["facts"], tensors)


def find_checkpoint(config: RunConfig) -> Snapshot:
    """Read the newest whole checkpoint of the run directory `run.resume`.

    Raises
    ------
    ConfigError
        If there is none, or it is of a run with another config.
    """
    directory = Path(config.run.resume).expanduser()
    given = f"run.resume is {config.run.resume!r}"
    for path in reversed(list_checkpoints(directory)):
        try:
            checkpoint = read_checkpoint(path)
            _check_sizes(directory, checkpoint)
        except DamagedError as error:
            log(WARNING, "%s is not used, but the one before: %s", path, error)
            continue
        _compare(given, checkpoint.facts["config"], flatten(config))
        return checkpoint
    raise ConfigError(
        f"{given}, which holds no whole checkpoint; allowed: the directory of a run "
        "that ended one round at least, or empty"
    )


def check_identity(
    config: RunConfig, checkpoint: Snapshot, found: Mapping[str, Any]
) -> None:
    """Compare what the run stands on: code, backbone, data.

    Raises
    ------
    ConfigError
        With what differs.
    """
    given = f"run.resume is {config.run.resume!r}"
    _compare(given, checkpoint.facts["identity"], found)


def checkpoint_path(directory: Path, number: int) -> Path:
    """Name the checkpoint after a round."""
    return directory / "checkpoints" / f"round-{number:04d}.safetensors"


def list_checkpoints(directory: Path) -> list[Path]:
    """List a run directory's checkpoints by their rounds, whole or not."""
    found = (directory / "checkpoints").glob("round-*.safetensors")
    return sorted(found, key=number_of)


def number_of(path: Path) -> int:
    """Give the round after which a checkpoint was written."""
    return int(path.stem.removeprefix("round-"))


def _compare(given: str, kept: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    keys = [key for key in {**kept, **found} if key not in FREE]
    differs = [
        f"{key} is {kept.get(key)!r} there and {found.get(key)!r} here"
        for key in keys
        if kept.get(key) != found.get(key)
    ]
    if differs:
        raise ConfigError(
            f"{given}, the directory of another run; allowed: one that is the same but "
            f"for {', '.join(FREE)}: {'; '.join(differs)}"
        )


def _check_sizes(directory: Path, checkpoint: Snapshot) -> None:
    for name in GROWING:
        path, wanted = directory / name, checkpoint.facts["sizes"][name]
        size = path.stat().st_size if path.is_file() else 0
        if size < wanted:
            raise DamagedError(f"{name} has {size} bytes, not the {wanted} of then")


def _digest(facts: str, tensors: State) -> str:
    digest = blake2b(facts.encode(), digest_size=16)
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
