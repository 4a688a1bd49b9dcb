"""The run directory and the writing of its files."""

import json
import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from slora_flwr.common.files import (
    PART,
    append,
    expand,
    home,
    make_folder,
    sync,
    write_atomically,
)
from slora_flwr.config import ConfigError, RunConfig
from slora_flwr.runs.checkpoint import GROWING, write_checkpoint
from slora_flwr.runs.checkpoint_files import (
    checkpoint_path,
    list_checkpoints,
    number_of,
)
from slora_flwr.runs.events import EVENTS, Event, read_events, to_line
from slora_flwr.runs.ledger import LEDGER, Entry, Ledger
from slora_flwr.runs.lock import sole_use
from slora_flwr.runs.release import Release
from slora_flwr.runs.snapshot import Snapshot
from slora_flwr.runs.writing import writing


class RunDirectory:
    """One run's folder; docs/reference/run-directory.md has its files.

    Parameters
    ----------
    config : RunConfig
        The run; `run.dir` names the folder, which must be new or empty.
    run_id : int
        Flower's run id, for the default name.
    checkpoint : Snapshot or None
        A checkpoint in the folder `run.resume`, from which the run continues there.
        What was written after the checkpoint is cut off.

    Raises
    ------
    ConfigError
        If the folder is not empty or cannot be made.
    RunDirectoryError
        If the folder of a resumed run cannot be written.

    Attributes
    ----------
    path : Path
        The folder.
    lineage : int
        Names the run across interruptions: the id of its first start.
    elapsed : float
        Seconds that the run took before it was resumed.
    ledger : Ledger
        The run's ledger.
    release : Release
        Writes the files that may leave the server with privacy.
    """

    def __init__(
        self, config: RunConfig, run_id: int, checkpoint: Snapshot | None = None
    ) -> None:
        self._keep = config.run.keep
        self.lineage, self.elapsed = run_id, 0.0
        if checkpoint is None:
            self.path = _make(config, run_id)
            with writing(self.path):
                append(self.path / EVENTS, "")
                self.ledger = Ledger(self.path / LEDGER)
        else:
            self.path = config.run.resumed.absolute()
            self.lineage = checkpoint.facts["lineage"]
            self.elapsed = checkpoint.facts["seconds"]
            with writing(self.path):
                self._cut_back(checkpoint)
        self.release = Release(self.path)
        self._followers: list[Callable[[Event], None]] = []
        self._started = time.perf_counter() - self.elapsed

    def event(self, event: Event) -> None:
        """Append an event to events.jsonl, with the seconds since the run's start."""
        event = replace(event, seconds=round(self._seconds, 3))
        with writing(self.path):
            append(self.path / EVENTS, to_line(event))
        for follower in self._followers:
            follower(event)

    def follow(self, follower: Callable[[Event], None]) -> None:
        """Hand a function the events so far, and each further one once it is written.

        Nothing that it raises is caught.
        """
        for event in read_events(self.path / EVENTS):
            follower(event)
        self._followers.append(follower)

    def record(self, entry: Entry) -> None:
        """Append one line to ledger.csv."""
        with writing(self.path):
            self.ledger.add(entry)

    def save_checkpoint(self, number: int, best: int, snapshot: Snapshot) -> None:
        """Write the checkpoint after a round, and delete old ones.

        Parameters
        ----------
        number : int
            The round.
        best : int
            The best round so far, whose checkpoint stays.
        snapshot : Snapshot
            What the run resumes from.
        """
        with writing(self.path):
            for name in GROWING:
                sync(self.path / name)
            snapshot.facts |= {
                "lineage": self.lineage,
                "seconds": self._seconds,
                "sizes": {name: (self.path / name).stat().st_size for name in GROWING},
            }
            write_checkpoint(checkpoint_path(self.path, number), snapshot)
        self.drop_checkpoints(best)

    def drop_checkpoints(self, best: int) -> None:
        """Delete all but the last checkpoints and the best round's."""
        with writing(self.path):
            for path in list_checkpoints(self.path)[: -self._keep]:
                if number_of(path) != best:
                    path.unlink()

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json."""
        text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
        with writing(self.path):
            write_atomically(self.path / "summary.json", text.encode(), durably=True)

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def _cut_back(self, checkpoint: Snapshot) -> None:
        sizes, number = checkpoint.facts["sizes"], checkpoint.facts["round"]
        # If the run had ended, it does so anew.
        (self.path / "summary.json").unlink(missing_ok=True)
        os.truncate(self.path / EVENTS, sizes[EVENTS])
        self.ledger = Ledger(self.path / LEDGER, sizes[LEDGER])
        for path in list_checkpoints(self.path):
            if number_of(path) > number:
                path.unlink()
        for path in self.path.rglob(f"*{PART}"):
            path.unlink()


def how_to_resume(path: Path) -> str:
    """Return a sentence on how the run in a directory goes on, or that it cannot."""
    if not list_checkpoints(path):
        return "It left no checkpoint, so there is nothing to resume."
    below = path.parent == home() / "runs"
    name = shlex.quote(path.name if below else str(path))
    return f"Go on with: slora resume {name}"


@contextmanager
def in_use(path: Path) -> Iterator[None]:
    """Lock an existing run directory against other runs.

    Raises
    ------
    ConfigError
        If a run is using it.
    RunDirectoryError
        If it cannot be written.
    """
    refusal = (
        f"run.resume is {str(path)!r}, which another run is using; allowed: the "
        "directory of a run that has ended"
    )
    with ExitStack() as held:
        with writing(path):
            # Unlike others, this file is never replaced, which would lose the lock.
            held.enter_context(sole_use(path / EVENTS, refusal))
        yield


def _make(config: RunConfig, run_id: int) -> Path:
    """Create and return a new run's folder."""
    date = time.strftime("%Y%m%d-%H%M%S")
    default = home() / "runs" / f"{date}-{config.method}-{run_id}"
    path = expand(config.run.dir) if config.run.dir else default
    path = path.absolute()
    try:
        if path.exists() and any(path.iterdir()):
            raise ConfigError(
                f"run.dir is {config.run.dir!r}, which holds files of another run; "
                "allowed: a new or empty folder, or run.resume to continue that run"
            )
        make_folder(path)
        # If two runs begin here at once, one fails.
        (path / "checkpoints").mkdir(mode=0o700)
    except OSError as error:
        raise ConfigError(
            f"run.dir is {config.run.dir!r}; allowed: a folder that can be made and "
            f"written ({error})"
        ) from error
    return path
