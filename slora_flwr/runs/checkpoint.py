"""Checkpoints, from which a run resumes after a round, bit for bit.

A checkpoint is one safetensors file, so a crash cannot mix parts of two checkpoints.
Its metadata hold the format, the facts as JSON, and a digest of facts and tensors,
which reveals damage that the format would not.
"""

import json
from collections.abc import Mapping
from functools import partial
from hashlib import blake2b
from logging import WARNING
from pathlib import Path
from typing import Any

import numpy as np
from flwr.common.logger import log
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from slora_flwr.common.files import expand, write_atomically
from slora_flwr.common.tensors import State
from slora_flwr.common.text import printable
from slora_flwr.config import ConfigError, RunConfig, flatten
from slora_flwr.runs.checkpoint_files import list_checkpoints
from slora_flwr.runs.events import EVENTS
from slora_flwr.runs.ledger import LEDGER, read_entries
from slora_flwr.runs.snapshot import Snapshot

FORMAT = "2"
# Files that grow during a run, truncated on resuming to their size at the checkpoint.
GROWING = (EVENTS, LEDGER)
# Keys that may change on resuming; no state depends on them.
FREE = (
    "run.dir",
    "run.resume",
    "run.keep",
    "run.target",
    "run.metrics-port",
    "track",
    "clients.min-nodes",
    "clients.deadline",
)


class DamagedError(ValueError):
    """A file that is not a whole checkpoint."""


def write_checkpoint(path: Path, snapshot: Snapshot) -> None:
    """Write a checkpoint to the disk, atomically."""
    # safetensors does not keep the order of tensors.
    facts = json.dumps(
        {"facts": snapshot.facts, "tensors": list(snapshot.tensors)}, allow_nan=False
    )
    tensors = {
        name: t.detach().cpu().contiguous() for name, t in snapshot.tensors.items()
    }
    digest = _digest(facts, tensors)
    metadata = {"format": FORMAT, "facts": facts, "digest": digest}
    write = partial(save_file, tensors, metadata=metadata)
    write_atomically(path, write, durably=True)


def read_checkpoint(path: Path) -> Snapshot:
    """Return the snapshot in a checkpoint.

    Raises
    ------
    DamagedError
        If the file is damaged.
    ConfigError
        If it has another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            format_ = metadata["format"]
            if format_ == FORMAT:
                facts = json.loads(metadata["facts"])
                # Cloned, since the file may be deleted while they are in use.
                tensors = {n: file.get_tensor(n).clone() for n in facts["tensors"]}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DamagedError(f"{type(error).__name__}: {error}") from error
    if format_ != FORMAT:
        raise ConfigError(
            f"checkpoint {path} is of format {format_}; allowed: {FORMAT}, that of "
            "this version of slora-flwr. Resume it with the version that wrote it"
        )
    if _digest(metadata["facts"], tensors) != metadata.get("digest"):
        raise DamagedError("its content does not match its digest")
    return Snapshot(facts["facts"], tensors)


def find_checkpoint(config: RunConfig) -> Snapshot:
    """Return the newest whole checkpoint that `run.resume` names.

    Raises
    ------
    ConfigError
        If there is none, or it belongs to a run with another config.
    """
    directory = config.run.resumed
    given = f"run.resume is {config.run.resume!r}"
    named = expand(config.run.resume)
    paths = list_checkpoints(directory)
    if named != directory:
        paths = [path for path in paths if path == named]
    told = ""
    for path in reversed(paths):
        try:
            checkpoint = read_checkpoint(path)
            _check_growing(directory, checkpoint)
        except DamagedError as error:
            log(WARNING, "%s is skipped for the one before it: %s", path, error)
            told = told or f". {path.name}: {printable(error)}"
            continue
        # Runs of older versions lack keys that are newer.
        kept = flatten(RunConfig()) | checkpoint.facts["config"]
        _compare(given, kept, flatten(config))
        return checkpoint
    raise ConfigError(
        f"{given}, which holds no whole checkpoint; allowed: the directory of a run "
        f"that finished at least one round, one of its checkpoints, or empty{told}"
    )


def check_identity(
    config: RunConfig, checkpoint: Snapshot, found: Mapping[str, Any]
) -> None:
    """Check that protocol, backbone and data are those of the checkpoint.

    Raises
    ------
    ConfigError
        If any differs.
    """
    given = f"run.resume is {config.run.resume!r}"
    kept = checkpoint.facts["identity"]
    if kept["protocol"] != found["protocol"]:
        raise ConfigError(
            f"{given}, a run of protocol {kept['protocol']}; allowed: "
            f"{found['protocol']}, that of this version of slora-flwr. Resume it with "
            "a version of its protocol"
        )
    _compare(given, kept, found)


def _compare(given: str, kept: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    keys = [key for key in {**kept, **found} if key not in FREE]
    differs = [
        f"{key} is {kept.get(key)!r} there and {found.get(key)!r} here"
        for key in keys
        if kept.get(key) != found.get(key)
    ]
    if differs:
        raise ConfigError(
            f"{given}, the directory of another run; allowed: one that differs only in "
            f"{', '.join(FREE)}: {'; '.join(differs)}"
        )


def _check_growing(directory: Path, checkpoint: Snapshot) -> None:
    for name in GROWING:
        path, wanted = directory / name, checkpoint.facts["sizes"][name]
        size = path.stat().st_size if path.is_file() else 0
        if size < wanted:
            raise DamagedError(f"{name} has {size} bytes, not {wanted} as recorded")
    try:
        read_entries(directory / LEDGER, checkpoint.facts["sizes"][LEDGER])
    except (OSError, ValueError) as error:
        raise DamagedError(f"{LEDGER}: {error}") from error


def _digest(facts: str, tensors: State) -> str:
    digest = blake2b(facts.encode(), digest_size=16)
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
