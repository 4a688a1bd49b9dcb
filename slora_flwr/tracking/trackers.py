"""The trackers of a run: each has what may leave the server, or is left out."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from logging import INFO, WARNING
from pathlib import Path

from flwr.common.logger import log

from slora_flwr.common.files import make_folder, write_atomically
from slora_flwr.common.text import printable
from slora_flwr.config import RunConfig, flatten
from slora_flwr.reports.page import write_page
from slora_flwr.reports.run_page import report
from slora_flwr.runs.directory import RunDirectory
from slora_flwr.runs.events import Event, RecordedRound
from slora_flwr.runs.reader import read_run
from slora_flwr.tracking.base import TrackedRun, Tracker
from slora_flwr.tracking.figures import figures_of, is_private

FOLDER = "tracking"
# What each tracker called the run, and the last round that it has.
KEPT = "trackers.json"
# What a run hands over at its end, if it is there; with privacy, none that stays.
_RELEASED = ("config.toml", "resolved.toml", "adapter")
_SUMMARY, _REPORT = "summary.json", "report.html"


@dataclass
class _Kept:
    id: str = ""
    round: int = 0


class Trackers:
    """Hands a run to its trackers: its config, each round, and its results.

    One that raises is left out for the rest of the run, with a warning. If the run is
    resumed, it goes on in the same run of the tracker, with the rounds that it lacks.

    With privacy a tracker gets everything at the run's end, since the time at which it
    gets a round would tell how large the cohort was.

    Parameters
    ----------
    kinds : Mapping[str, type[Tracker]]
        The trackers, by name.
    config : RunConfig
        The run.
    directory : RunDirectory
        Its directory.
    after : int
        The round after which the run goes on; 0 for a new run.
    """

    def __init__(
        self,
        kinds: Mapping[str, type[Tracker]],
        config: RunConfig,
        directory: RunDirectory,
        after: int,
    ) -> None:
        self._config, self._directory, self._after = config, directory, after
        self._path = directory.path / FOLDER
        self._kinds = dict(kinds)
        self._trackers: dict[str, Tracker] = {}
        self._kept: dict[str, _Kept] = {}
        self._waiting: list[RecordedRound] | None = [] if is_private(config) else None
        if self._waiting is None:
            self._begin()

    def follow(self, event: Event) -> None:
        """Hand a closed round to the trackers that lack it."""
        if not isinstance(event, RecordedRound):
            return
        if self._waiting is not None:
            self._waiting.append(event)
            return
        figures: dict[str, float] = {}
        for name, tracker in [*self._trackers.items()]:
            kept = self._kept[name]
            if kept.round >= event.round:
                continue
            figures = figures or figures_of(event, self._directory.ledger, self._config)
            with self._guarded(name):
                tracker.log(event.round, figures)
                kept.round = event.round
                self._keep()

    def end(self, *, completed: bool) -> None:
        """Hand over what is left, and the run's results."""
        if self._waiting is not None:
            rounds, self._waiting = self._waiting, None
            self._begin()
            for done in rounds:
                self.follow(done)
        artefacts: list[Path] = []
        for name, tracker in [*self._trackers.items()]:
            with self._guarded(name):
                artefacts = artefacts or self._artefacts()
                tracker.finish(artefacts, completed=completed)

    def _begin(self) -> None:
        if not self._directory.path.is_dir():
            return  # somebody has removed it meanwhile
        for name, kind in self._kinds.items():
            with self._guarded(name):
                make_folder(self._path / name)
                self._start(name, kind)

    def _start(self, name: str, kind: type[Tracker]) -> None:
        if not self._kept and (path := self._path / KEPT).exists():
            rows = json.loads(path.read_text())
            self._kept = {name: _Kept(**row) for name, row in rows.items()}
        kept = self._kept.setdefault(name, _Kept())
        config = flatten(self._config)
        for key in ("run.dir", "run.resume"):
            del config[key]
        after = min(kept.round, self._after)
        run = TrackedRun(
            self._directory.path.name, config, self._path / name, kept.id, after
        )
        self._trackers[name] = tracker = kind(run)
        kept.id = tracker.id
        if kind.takes_back:
            kept.round = after
        elif kept.round > self._after:
            told = "track: %s has the rounds up to %d already, and keeps them"
            log(INFO, told, name, kept.round)
        self._keep()

    def _keep(self) -> None:
        rows = {name: asdict(kept) for name, kept in self._kept.items()}
        write_atomically(self._path / KEPT, json.dumps(rows).encode())

    def _artefacts(self) -> list[Path]:
        """Return the files and folders to hand over."""
        directory = self._directory.path
        found = [directory / name for name in _RELEASED]
        if not is_private(self._config) and (directory / _SUMMARY).exists():
            found.append(directory / _SUMMARY)
            found.append(self._path / _REPORT)
            write_page(report(read_run(directory)), found[-1])
        return [path for path in found if path.exists()]

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Leave a tracker out that raises."""
        try:
            yield
        except Exception as error:  # of somebody else's library, so it may be any
            self._trackers.pop(name, None)
            told = "track: %s failed and is left out for the rest of the run: %s"
            log(WARNING, told, name, printable(f"{type(error).__name__}: {error}"))
