"""slora-flwr as `slora run --engine inline` runs it, run directory included."""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from slora_flwr.engines.inline import run_inline
from slora_flwr.reports.progress import Closed, read_line
from slora_flwr.runs.reader import read_run
from work import Work


def train(work: Work, ended: Callable[[], None]) -> list[float]:
    """Train all rounds; return the mean loss of each."""

    class Rounds(logging.Handler):
        """Notes the end of each round, of which the log tells."""

        def emit(self, record: logging.LogRecord) -> None:
            """Take up a line of the log."""
            if isinstance(read_line(record.levelname, record.getMessage()), Closed):
                ended()

    logging.getLogger("flwr").addHandler(Rounds())
    with tempfile.TemporaryDirectory(dir=work.folder) as folder:
        run_inline({**work.config, "run.dir": f"{folder}/run"})
        rounds = read_run(Path(folder) / "run").rounds
    return [done.train_loss for done in rounds if done.train_loss is not None]
