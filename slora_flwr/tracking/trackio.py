"""Trackio: its store on this machine, or what its environment variables name."""

import os
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from secrets import token_hex

from trackio import Artifact, finish, init

from slora_flwr.tracking.base import TrackedRun


class TrackioTracker:
    """See `slora_flwr.tracking.base.Tracker`."""

    takes_back = False

    def __init__(self, run: TrackedRun) -> None:
        # Trackio finds a run by its name, which another run directory may share.
        self.id = run.id or f"{run.name}-{token_hex(3)}"
        self._artefact = run.artefact
        with redirect_stdout(StringIO()):  # it prints how to see its pages
            self._run = init(
                project=os.environ.get("TRACKIO_PROJECT") or "slora",
                name=self.id,
                resume="must" if run.id else "never",
                config=run.config,
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def log(self, number: int, figures: Mapping[str, float]) -> None:
        """Log the figures, the round as Trackio's step."""
        self._run.log(dict(figures), step=number)

    def finish(self, artefacts: Sequence[Path], *, completed: bool) -> None:
        """Log the files as one artefact."""
        if artefacts:
            artefact = Artifact(self._artefact, type="run")
            for path in artefacts:
                if path.is_dir():
                    artefact.add_dir(path, name=path.name)
                else:
                    artefact.add_file(path)
            self._run.log_artifact(artefact)
        with redirect_stdout(StringIO()):
            finish()
