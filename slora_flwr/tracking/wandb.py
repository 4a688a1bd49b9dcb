"""Weights & Biases: offline unless its environment variables say otherwise."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wandb import Artifact, Settings, init

from slora_flwr.tracking.base import TrackedRun

# Seconds for what has not been uploaded by the end.
_PATIENCE = 600.0


class WandbTracker:
    """See `slora_flwr.tracking.base.Tracker`."""

    takes_back = False

    def __init__(self, run: TrackedRun) -> None:
        mode: Any = os.environ.get("WANDB_MODE")
        if not mode:
            mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        if mode == "offline":
            # Even then it would report the library's own use to its makers.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._run = init(
            project=os.environ.get("WANDB_PROJECT") or "slora",
            dir=os.environ.get("WANDB_DIR") or run.folder,
            name=os.environ.get("WANDB_NAME") or run.name,
            id=run.id or None,
            resume="allow" if run.id else None,
            mode=mode,
            config=run.config,
            reinit="create_new",
            settings=Settings(
                silent=True,
                console="off",
                finish_timeout=_PATIENCE,
                finish_timeout_raises=True,
                # Of the machine and its user, nothing is recorded.
                disable_git=True,
                save_code=False,
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )
        self._artefact = run.artefact
        self.id = self._run.id

    def log(self, number: int, figures: Mapping[str, float]) -> None:
        """Log the figures, the round as W&B's step."""
        self._run.log(dict(figures), step=number, commit=True)

    def finish(self, artefacts: Sequence[Path], *, completed: bool) -> None:
        """Log the files as one artefact."""
        if artefacts:
            artefact = Artifact(self._artefact, type="run")
            for path in artefacts:
                # One by one, since it prints how it adds a folder.
                for file in path.rglob("*") if path.is_dir() else [path]:
                    name = file.relative_to(path.parent).as_posix()
                    artefact.add_file(str(file), name=name)
            self._run.log_artifact(artefact)
        self._run.finish(exit_code=0 if completed else 1)
