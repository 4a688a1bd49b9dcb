"""TensorBoard: event files in the run directory."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from slora_flwr.tracking.base import TrackedRun


class TensorBoardTracker:
    """See `slora_flwr.tracking.base.Tracker`."""

    takes_back = True
    id = "tensorboard"

    def __init__(self, run: TrackedRun) -> None:
        # Rounds from `purge_step` on that an earlier file has are hidden.
        again = run.after + 1 if run.id else None
        self._writer = SummaryWriter(str(run.folder), purge_step=again)
        rows = [f"| {key} | {value} |" for key, value in run.config.items()]
        table = "\n".join(["| key | value |", "|---|---|", *rows])
        self._writer.add_text("config", table, run.after)

    def log(self, number: int, figures: Mapping[str, float]) -> None:
        """Write a scalar for each figure."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, number)
        self._writer.flush()

    def finish(self, artefacts: Sequence[Path], *, completed: bool) -> None:
        """Write the summary as text; TensorBoard keeps no files."""
        for path in artefacts:
            if path.name == "summary.json":
                self._writer.add_text("summary", f"```\n{path.read_text()}\n```")
        self._writer.close()
