"""The release of a run: the files that may leave the server where privacy is on.

They hold what was computed from noised sums, and what was known before the first round.
Whatever depends on who was drawn, or on figures without noise, is in the other files,
which stay with the server. Of the log, lines of level INFO and what is printed at the
end may leave it too.
"""

import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from shutil import copyfile
from types import MappingProxyType
from typing import Any

import tomli_w
from safetensors import safe_open

from slora_flwr.common.files import make_folder, make_private, write_atomically
from slora_flwr.common.tensors import State, save_tensors
from slora_flwr.config import RunConfig, flatten
from slora_flwr.runs.writing import writing

# The files of a run directory, and folders with all that is in them: what they hold.
RELEASED = {
    "config.toml": "the config",
    "resolved.toml": "versions, the engine, the backbone's digest, the guarantee",
    "checkpoints/": "the global states, and the bases on which they stand",
    "adapter/": "the exported adapter",
    "model/": "the exported model",
}
KEPT = {
    "events.jsonl": "cohorts, losses and seconds of clients, failures",
    "ledger.csv": "bytes, which count who took part",
    "summary.json": "bytes and seconds, which count who took part",
    "report.html": "the content of these files",
    "tracking/": "what trackers were handed, and when the run ended",
}
PACKAGES = ("slora-flwr", "flwr", "torch", "transformers", "peft", "datasets", "numpy")
# What a config resolves to that is counted over the data of all clients.
_COUNTED = ("train_examples", "moved_examples")


class Release:
    """The one writer of a run's `RELEASED` files.

    Parameters
    ----------
    path : Path
        The run directory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def write_config(self, config: RunConfig) -> None:
        """Write the config, without `run.dir`, so that it can be run again as it is."""
        nested: dict[str, Any] = {}
        for name, value in flatten(config).items():
            *section, last = name.split(".")
            owner = nested.setdefault(section[0], {}) if section else nested
            owner[last] = value
        del nested["run"]["dir"]
        self._write(self._path / "config.toml", tomli_w.dumps(nested).encode())

    def write_resolved(
        self,
        config: RunConfig,
        resolved: dict[str, Any],
        engine: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Write versions, the engine, and what the config resolved to."""
        versions = {name: version(name) for name in PACKAGES}
        versions["python"] = platform.python_version()
        if config.privacy.is_on:
            resolved = {n: v for n, v in resolved.items() if n not in _COUNTED}
        tables = {"versions": versions, "engine": {**engine}, "resolved": resolved}
        self._write(self._path / "resolved.toml", tomli_w.dumps(tables).encode())

    def save_state(self, name: str, state: State, **facts: str) -> None:
        """Write a state to checkpoints/ as safetensors.

        Its name is `last`, `averaged`, `best`, or `base`, `averaged-base`, `best-base`
        for the base that it stands on; `base` is also that of `averaged` if there is no
        `averaged-base`.
        """
        self._write(self._state(name), partial(save_tensors, state, facts=facts))

    def copy_state(self, name: str, other: str) -> None:
        """Copy a state to another name; delete the copy if there is no such state."""
        path = self._state(name)
        if path.is_file():
            self._write(self._state(other), partial(copyfile, path))
        else:
            self.drop_state(other)

    def round_of(self, name: str) -> int:
        """Return the round of a state on the disk; 0 if there is none."""
        path = self._state(name)
        if not path.is_file():
            return 0
        with safe_open(path, framework="pt") as file:
            return int(file.metadata()["round"])

    def drop_state(self, name: str) -> None:
        """Delete a state, if there is one of that name."""
        with writing(self._path):
            self._state(name).unlink(missing_ok=True)

    @contextmanager
    def export(self, name: str) -> Iterator[Path]:
        """Yield a new folder for an export; close it to others once it is written."""
        folder = self._path / name
        with writing(self._path):
            make_folder(folder)
            yield folder
            make_private(folder)

    def _write(self, path: Path, data: bytes | Callable[[Path], object]) -> None:
        with writing(self._path):
            write_atomically(path, data, durably=True)

    def _state(self, name: str) -> Path:
        return self._path / "checkpoints" / f"{name}.safetensors"
