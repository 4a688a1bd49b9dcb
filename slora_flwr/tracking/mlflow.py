"""MLflow: the server that MLFLOW_TRACKING_URI names, or a SQLite file of the run."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from slora_flwr.common.quiet import quiet_mlflow
from slora_flwr.tracking.base import TrackedRun

# Read at its import: it would report its own use to its makers.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# A server that is away is given up after seconds, not minutes; the run waits for it.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

_MOST_PARAMS = 100  # that a request may have


class MlflowTracker:
    """See `slora_flwr.tracking.base.Tracker`."""

    takes_back = False

    def __init__(self, run: TrackedRun) -> None:
        quiet_mlflow()
        given = os.environ.get("MLFLOW_TRACKING_URI")
        uri = given or f"sqlite:///{run.folder / 'mlflow.db'}"
        self._client = MlflowClient(uri)
        if run.id:
            self.id = run.id
            self._client.update_run(self.id, "RUNNING")
            return
        files = None if given else (run.folder / "artifacts").as_uri()
        made = self._client.create_run(self._experiment(files), run_name=run.name)
        self.id = made.info.run_id
        params = [Param(key, str(value)) for key, value in run.config.items()]
        for first in range(0, len(params), _MOST_PARAMS):
            some = params[first : first + _MOST_PARAMS]
            self._client.log_batch(self.id, params=some)

    def _experiment(self, files: str | None) -> str:
        """Return the id of the experiment, which is made if there is none yet."""
        if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return given
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "slora"
        if found := self._client.get_experiment_by_name(name):
            return str(found.experiment_id)
        return str(self._client.create_experiment(name, artifact_location=files))

    def log(self, number: int, figures: Mapping[str, float]) -> None:
        """Log the figures, the round as MLflow's step."""
        now = time.time_ns() // 1_000_000
        metrics = [Metric(name, x, now, number) for name, x in figures.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def finish(self, artefacts: Sequence[Path], *, completed: bool) -> None:
        """Log the files, each by its name."""
        for path in artefacts:
            if path.is_dir():
                self._client.log_artifacts(self.id, str(path), path.name)
            else:
                self._client.log_artifact(self.id, str(path))
        self._client.set_terminated(self.id, "FINISHED" if completed else "FAILED")
