"""Recorded runs, read from their directories."""

import os
import re
import tomllib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, StrictBool, StrictFloat, StrictStr

from slora_flwr.common.facts import Count, Figure, check
from slora_flwr.common.files import expand, home, read_regular
from slora_flwr.common.text import default_name, printable, shorten
from slora_flwr.config import RunConfig, Value, flatten
from slora_flwr.config.arguments import flatten_tables
from slora_flwr.runs.checkpoint_files import list_checkpoints
from slora_flwr.runs.events import (
    EVENTS,
    INTERRUPTED,
    ClientsFailed,
    Event,
    HandedOff,
    NodeJoined,
    NodeLeftOut,
    RecordedRound,
    Stopped,
    Unreadable,
    read_events,
    read_json,
)
from slora_flwr.runs.ledger import LEDGER, Entry, read_entries
from slora_flwr.runs.lock import is_locked
from slora_flwr.runs.roster import ROSTER, read_roster

T = TypeVar("T")


class RunError(ValueError):
    """The path or name is not a run; the message says what is allowed."""


class AmbiguousRunError(RunError):
    """Several runs have names or ids that begin so; the message names them."""


@dataclass(frozen=True)
class Failure:
    """Clients or a node left out, and why; `round` is None before the first round."""

    round: int | None
    node: str
    clients: list[int]
    reason: str


@dataclass(frozen=True)
class PhaseSummary:
    """What reports need of a phase in summary.json; older versions lack it."""

    seconds: Figure | None = None


@dataclass(frozen=True)
class Summary:
    """What reports need of summary.json.

    Attributes
    ----------
    seconds : float
        Seconds that the run took.
    majority_accuracy : float or None
        Accuracy of the most frequent class, if known.
    warning : str
        That the accuracy at the end is near it; empty if it is not.
    phases : dict[str, PhaseSummary]
        The phases by adapter.
    same_rounds : dict[str, int]
        Bytes that other methods would send in these rounds, one direction.
    """

    seconds: Figure
    majority_accuracy: Figure | None = None
    warning: str = ""
    phases: dict[str, PhaseSummary] = field(default_factory=dict)
    same_rounds: dict[str, Count] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordedEngine:
    """What made a run, an engine of `slora run` or a deployment, and how many nodes."""

    name: Literal["flwr", "inline", "deployment"] = "flwr"
    nodes: Annotated[int, Field(strict=True, ge=1)] | None = None


@dataclass(frozen=True)
class RecordedRun:
    """A run that ended, was stopped, or is still going.

    Attributes
    ----------
    path : Path
        Its directory.
    config : dict[str, Value]
        Flat keys; those that the run's version lacked have their defaults.
    facts : dict
        The tables `versions` and `resolved` of resolved.toml.
    engine : RecordedEngine
        What made it.
    delta : float or None
        The delta of its privacy, if it has one.
    summary : Summary or None
        The summary; None if the run has not ended.
    stopped : str or None
        Why it was stopped, if recorded.
    rounds, failures, ledger : list
        In the order of their events.
    energies : dict[str, float]
        Share of each matrix's squared norm that the handoff kept; empty without one.
    unreadable : int
        Number of the events' lines that cannot be read.
    """

    path: Path
    config: dict[str, Value]
    facts: dict[str, dict[str, Any]]
    engine: RecordedEngine
    delta: float | None
    summary: Summary | None
    stopped: str | None
    rounds: list[RecordedRound]
    failures: list[Failure]
    energies: dict[str, float]
    ledger: list[Entry]
    unreadable: int

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.config["method"])

    @property
    def state(self) -> str:
        """`running`, `finished`, `failed` or `interrupted`."""
        events = self.path / EVENTS
        if events.exists() and is_locked(events):
            return "running"
        if self.summary is not None:
            return "finished"
        is_failure = self.stopped not in (None, INTERRUPTED)
        return "failed" if is_failure else "interrupted"

    @property
    def has_ended_early(self) -> bool:
        """Whether no process is making it, and it is not whole."""
        return self.state in ("failed", "interrupted")

    @property
    def can_resume(self) -> bool:
        """Whether it ended early and left a checkpoint."""
        return self.has_ended_early and bool(list_checkpoints(self.path))

    @property
    def accuracy(self) -> float | None:
        """The accuracy after the last round that was evaluated."""
        return self.evaluated[-1].metrics["accuracy"] if self.evaluated else None

    @property
    def phases(self) -> dict[str, list[RecordedRound]]:
        """The rounds of each phase, in order."""
        phases: dict[str, list[RecordedRound]] = {}
        for done in self.rounds:
            phases.setdefault(done.phase, []).append(done)
        return phases

    @property
    def damage(self) -> str:
        """What of its events is lost, in a sentence; empty if nothing is."""
        if not self.unreadable:
            return ""
        lines = f"{self.unreadable} of the lines of {EVENTS}"
        return f"{lines} cannot be read, and are left out."

    @property
    def evaluated(self) -> list[RecordedRound]:
        """The rounds that have an accuracy."""
        return [done for done in self.rounds if "accuracy" in done.metrics]

    def total(self, unit: str, direction: str, phase: str | None = None) -> int | None:
        """Return the bytes in the ledger, of one phase or all.

        Parameters
        ----------
        unit : str
            `payload`, `message` or `planned_payload`. The sum of the last is None if
            no line has it.
        direction : str
            `up` or `down`.
        phase : str or None
            The phase's name; None for all phases.
        """
        sizes = [
            getattr(line, f"{unit}_bytes")
            for line in self.ledger
            if line.direction == direction and phase in (None, line.phase)
        ]
        known = [size for size in sizes if size is not None]
        return sum(known) if known or not sizes else None


def read_run(path: Path) -> RecordedRun:
    """Return the run in a run directory.

    Raises
    ------
    RunError
        If it is not a run directory, or one of its files cannot be read.
    """
    if not is_run(path):
        raise _refuse(str(path))
    config = _read(path, "config.toml", _read_config)
    facts = _read(path, "resolved.toml", _read_facts)
    events = _read(path, EVENTS, read_events)
    has_ended = os.path.lexists(path / "summary.json")
    return RecordedRun(
        path=path,
        facts={"versions": facts.versions, "resolved": facts.resolved},
        engine=facts.engine,
        delta=facts.delta,
        config=config,
        summary=_read(path, "summary.json", _read_summary) if has_ended else None,
        stopped=next(
            (e.reason for e in reversed(events) if isinstance(e, Stopped)), None
        ),
        # If a round was repeated after a stop, its last attempt counts.
        rounds=list(
            {e.round: e for e in events if isinstance(e, RecordedRound)}.values()
        ),
        failures=_failures(events),
        energies=next((e.energies for e in events if isinstance(e, HandedOff)), {}),
        ledger=_read(path, LEDGER, read_entries),
        unreadable=sum(isinstance(e, Unreadable) for e in events),
    )


def _read(path: Path, name: str, read: Callable[[Path], T]) -> T:
    try:
        return read(path / name)
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(
            f"{path} cannot be read as a run directory: {name}: {printable(error)}"
        ) from error


def _read_summary(path: Path) -> Summary:
    return check(Summary, read_json(read_regular(path)))


@dataclass(frozen=True)
class _Privacy:
    delta: Figure | None = None


# The value of a key by the type of its default.
_VALUES: dict[type, Any] = {
    bool: dict[str, StrictBool],
    int: dict[str, Annotated[int, Field(strict=True, ge=-(2**53), le=2**53)]],
    float: dict[str, StrictFloat],
    str: dict[str, StrictStr],
}


@dataclass(frozen=True)
class _Facts:
    versions: dict[str, Any]
    resolved: dict[str, Any]
    engine: RecordedEngine
    delta: float | None


def _read_facts(path: Path) -> _Facts:
    document = _read_toml(path)
    names = ("versions", "resolved")
    tables = check(dict[str, dict[str, Any]], {n: document.get(n, {}) for n in names})
    engine = check(RecordedEngine, document.get("engine", {}))
    delta = check(_Privacy, tables["resolved"].get("privacy", {})).delta
    return _Facts(**tables, engine=engine, delta=delta)


def _read_toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(read_regular(path).decode("utf-8-sig"))


def _read_config(path: Path) -> dict[str, Value]:
    config, defaults = flatten_tables(_read_toml(path)), flatten(RunConfig())
    for key, value in config.items():
        # Runs of other versions may have keys that are unknown here.
        kind = type(defaults.get(key, value))
        check(_VALUES.get(kind, dict[str, Value]), {key: value})
    return defaults | config


def is_run(path: Path) -> bool:
    """Return whether a folder is a run directory."""
    try:
        return (path / "config.toml").is_file() and (path / LEDGER).is_file()
    except OSError:  # it is closed to this user, or its name is too long
        return False


def find_run(given: str | None) -> Path:
    """Return a run directory by its path, or its name or id below `$SLORA_HOME/runs`.

    Parameters
    ----------
    given : str or None
        Path, name, id, which ends the name, or the beginning of name or id; None for
        the newest run there.

    Raises
    ------
    RunError
        If there is none.
    AmbiguousRunError
        If several begin so.
    """
    found = list_runs()
    if given is None:
        if not found:
            raise RunError(f"{_runs()} holds no run; allowed: a run directory")
        return found[0]
    for path in _candidates(given):
        if is_run(path):
            return path
    same = [path for path in found if _id_of(path) == given]
    begun = same or [
        path
        for path in found
        if path.name.startswith(given) or _id_of(path).startswith(given)
    ]
    if len(begun) > 1:
        names = ", ".join(shorten([path.name for path in begun]))
        raise AmbiguousRunError(
            f"{given} is the beginning of {names}; allowed: one of them"
        )
    if not given or not begun:
        raise _refuse(given)
    return begun[0]


def find_resumable() -> Path:
    """Return the newest run below `$SLORA_HOME/runs` that can be resumed.

    Raises
    ------
    RunError
        If there is none.
    """
    for path in list_runs():
        with suppress(RunError):  # it is damaged
            if read_run(path).can_resume:
                return path
    raise RunError(
        f"{_runs()} holds no run that can be resumed; allowed: RUN, a run that ended "
        "early and left a checkpoint"
    )


def names_run(given: str) -> bool:
    """Return whether this is a run's whole path, name or id, not a beginning."""
    names = (name for path in list_runs() for name in (path.name, _id_of(path)))
    return is_run(expand(given)) or given in names


def list_runs(folders: Iterable[str] = ()) -> list[Path]:
    """Return the run directories in folders, the newest first.

    Parameters
    ----------
    folders : Iterable[str]
        As for `find_runs`; without any, `$SLORA_HOME/runs`, which may hold none.

    Raises
    ------
    RunError
        As `find_runs` does.
    """
    given = [*folders]
    below = (path for path in _runs().glob("*") if is_run(path))
    found = find_runs(given) if given else below
    return sorted(found, key=lambda path: (began(path), path), reverse=True)


def began(path: Path) -> float:
    """Return the time at which a run began, in seconds since the epoch."""
    return (path / "config.toml").stat().st_mtime


def find_runs(given: Iterable[str]) -> list[Path]:
    """Return run directories, each once: by path or name, or all below a folder.

    Raises
    ------
    RunError
        If one of `given` is not a run directory and holds none.
    """
    paths: dict[Path, Path] = {}
    for name in given:
        found = next(filter(None, map(_runs_at, _candidates(name))), None)
        if found is None:
            raise _refuse(name, "a folder that holds such")
        paths |= {path.resolve(): path for path in found}
    return list(paths.values())


def find_current(given: Iterable[str]) -> tuple[list[Path], dict[Path, list[Path]]]:
    """Return run directories as `find_runs` does, without those of edited studies.

    Returns
    -------
    list[Path]
        Those that were given themselves, and those below folders that the study of
        their own folder, as it was last swept, has.
    dict[Path, list[Path]]
        The others, by folder.

    Raises
    ------
    RunError
        If one of `given` is not a run directory and holds none, or if a folder's list
        of runs cannot be read.
    """
    given = list(given)
    found = find_runs(given)
    alone = {p.resolve() for name in given for p in _candidates(name) if is_run(p)}
    rosters = {
        folder: _read(folder, ROSTER, read_roster)
        for folder in {path.parent for path in found}
    }
    left_out: dict[Path, list[Path]] = {}
    for path in found:
        names = rosters[path.parent]
        if not (names is None or path.name in names or path.resolve() in alone):
            left_out.setdefault(path.parent, []).append(path)
    gone = {path for paths in left_out.values() for path in paths}
    return [path for path in found if path not in gone], left_out


def by_layer(energies: dict[str, float]) -> dict[str, dict[int, float]]:
    """Return a figure of each matrix, by kind of matrix and then by layer.

    The layer is the last number in a matrix's name, and the kind is what follows it. If
    matrices differ in what stands before the number, the kind begins with that.
    """
    split = {name: re.match(r"(?:(.*)\.)?(\d{1,9})\.(.*)", name) for name in energies}
    parts = {
        name: (found[1] or "", int(found[2]), found[3]) if found else ("", 0, name)
        for name, found in split.items()
    }
    alike = len({before for before, _, _ in parts.values()}) == 1
    sorted_: dict[str, dict[int, float]] = {}
    for name, (before, layer, kind) in parts.items():
        full = kind if alike else f"{before}.{kind}".strip(".")
        sorted_.setdefault(full, {})[layer] = energies[name]
    return sorted_


def _runs_at(path: Path) -> list[Path]:
    if is_run(path):
        return [path]
    folders = (file.parent for file in path.rglob("config.toml"))
    return sorted(folder for folder in folders if is_run(folder))


def _id_of(path: Path) -> str:
    return path.name.rpartition("-")[2]


def _candidates(given: str) -> tuple[Path, Path]:
    return expand(given), _runs() / given


def _runs() -> Path:
    return home() / "runs"


def _refuse(given: str, *others: str) -> RunError:
    allowed = (
        "a run directory, which holds config.toml and ledger.csv",
        f"the name or id of one below {_runs()}, or its beginning",
        *others,
    )
    return RunError(f"{given} is not a run; allowed: {', or '.join(allowed)}")


def _failures(events: Iterable[Event]) -> list[Failure]:
    """Return the failures that events report, with nodes named as in the log."""
    found: list[Failure] = []
    names: dict[int, str] = {}
    for event in events:
        if isinstance(event, NodeJoined):
            name, client = event.name, event.client
            alone = name in (default_name(client), default_name(event.node))
            names[event.node] = name if alone else f"{name} (node {event.node})"
        elif isinstance(event, NodeLeftOut):
            found.append(Failure(None, event.name, [], event.reason))
        elif isinstance(event, ClientsFailed):
            told = event.name or names.get(event.node, default_name(event.node))
            found.append(Failure(event.round, told, event.clients, event.reason))
    return found
