"""Where a run writes what it was, what happened, and what came of it."""

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w
from safetensors.torch import save

from slora_flwr.adapters.head import State
from slora_flwr.config import ConfigError, RunConfig, flatten
from slora_flwr.home import home, write_atomically
from slora_flwr.wire.ledger import Ledger

PACKAGES = ("slora-flwr", "flwr", "torch", "transformers", "peft", "datasets", "numpy")


class RunDirectory:
    """One run's folder; see the README for its files.

    Parameters
    ----------
    config : RunConfig
        The run; `run.dir` names the folder, which must be new or empty.
    run_id : int
        Flower's, for the default name.

    Raises
    ------
    ConfigError
        If the folder holds something already.
    """

    def __init__(self, config: RunConfig, run_id: int) -> None:
        date = time.strftime("%Y%m%d-%H%M%S")
        default = home() / "runs" / f"{date}-{config.method}-{run_id}"
        self.path = Path(config.run.dir).expanduser() if config.run.dir else default
        self.path = self.path.absolute()
        if self.path.exists() and any(self.path.iterdir()):
            raise ConfigError(
                f"run.dir is {config.run.dir!r}, which holds files of another run; "
                "allowed: a new or empty folder"
            )
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger(self.path / "ledger.csv")
        self._started = time.perf_counter()

    def write_config(self, config: RunConfig, resolved: dict[str, Any]) -> None:
        """Write the config as run, with versions and what was resolved from it."""
        nested: dict[str, Any] = {}
        for name, value in flatten(config).items():
            *section, last = name.split(".")
            owner = nested.setdefault(section[0], {}) if section else nested
            owner[last] = value
        versions = {name: version(name) for name in PACKAGES}
        versions["python"] = platform.python_version()
        nested |= {"versions": versions, "resolved": resolved}
        write_atomically(self.path / "config.toml", tomli_w.dumps(nested).encode())

    def event(self, kind: str, **facts: Any) -> None:
        """Append one line to events.jsonl."""
        seconds = round(time.perf_counter() - self._started, 3)
        line = json.dumps({"event": kind, "seconds": seconds, **facts})
        with (self.path / "events.jsonl").open("a") as file:
            file.write(line + "\n")

    def save_state(self, name: str, state: State, **facts: str) -> None:
        """Write a state to checkpoints/ as safetensors.

        It is `last` or `best`, or the `base` that the last one stands on; the base of
        the best is `best-base`.
        """
        write_atomically(self._state(name), save(state, metadata=facts))

    def copy_state(self, name: str, other: str) -> None:
        """Keep a state under another name too, or none if there is no such state."""
        path = self._state(name)
        if path.is_file():
            write_atomically(self._state(other), path.read_bytes())
        else:
            self.drop_state(other)

    def drop_state(self, name: str) -> None:
        """Remove a state that no longer holds, if there is one."""
        self._state(name).unlink(missing_ok=True)

    def _state(self, name: str) -> Path:
        return self.path / "checkpoints" / f"{name}.safetensors"

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json."""
        text = json.dumps(summary, indent=2) + "\n"
        write_atomically(self.path / "summary.json", text.encode())
