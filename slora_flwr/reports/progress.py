"""Progress: the line printed after each round, and those within a long one."""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from logging import INFO
from typing import Protocol

from flwr.common.logger import log

from slora_flwr.common.facts import check_cells
from slora_flwr.common.text import counted
from slora_flwr.reports.figures import FORMS, first_of
from slora_flwr.runs.events import RecordedRound

# A round that takes longer tells how far it is: after so many seconds, and again after
# as many more or a quarter more of the time, whichever is later.
FIRST_SECONDS = 10.0
_SHARE = 0.25
_ROUND = r"round +(?P<round>\d{1,9})/(?P<rounds>\d{1,9}) (?P<phase>\S+)"
_WITHIN = re.compile(
    _ROUND + r": (?P<answered>\d{1,9}) of (?P<cohort>\d{1,9}) clients? "
    r"answered after [\d:]+"
)
_CLOSED = re.compile(
    _ROUND + r" +(?:clients (?P<clients>\d+/\d+)  loss +(?P<loss>\S+)  )?"
    r"(?P<metric>\S+(?: \S+)*) +(?P<value>\S+)  "
    r"(?:epsilon (?P<epsilon>\S+)|(?P<megabytes>\S+) MB  (?P<left>\S+) left)"
)
_FAILED = re.compile(r".*(?:, clients \[[\d, ]*\] left out| is left out): .*")


@dataclass(frozen=True)
class Within:
    """What a line says of a round that is under way."""

    round: int
    rounds: int
    phase: str
    answered: int
    cohort: int


@dataclass(frozen=True)
class Closed:
    """What the progress line of a round says, as it is written there.

    With privacy it has `epsilon`, and neither of `clients`, `loss`, `megabytes` and
    `left`.
    """

    round: int
    rounds: int
    phase: str
    metric: str
    value: str
    clients: str | None = None
    loss: str | None = None
    megabytes: str | None = None
    left: str | None = None
    epsilon: str | None = None

    @property
    def has_value(self) -> bool:
        """Whether the round was evaluated."""
        return self.value != "-"


@dataclass(frozen=True)
class Failed:
    """A line that says that clients or a node were left out."""


def read_line(level: str, message: str) -> Within | Closed | Failed | None:
    """Return what a line of a run's log says of its progress, if anything.

    Parameters
    ----------
    level : str
        The line's level, such as INFO.
    message : str
        The line without it.
    """
    if level == "WARNING":
        return Failed() if _FAILED.fullmatch(message) else None
    if level != "INFO":
        return None
    if found := _WITHIN.fullmatch(message):
        return check_cells(Within, found.groupdict())
    if found := _CLOSED.fullmatch(message):
        known = {name: cell for name, cell in found.groupdict().items() if cell}
        return check_cells(Closed, known)
    return None


class Live(Protocol):
    """Shows on a terminal what lines of the log say."""

    def hear(self, level: str, message: str) -> bool:
        """Take up a line; return whether it is shown."""


def progress_line(rounds: int, done: RecordedRound) -> str:
    """Return the progress line of a round.

    With privacy it has only what was computed from noised sums: counts of clients,
    losses, bytes and seconds depend on who was drawn.

    Parameters
    ----------
    rounds : int
        Number of rounds of the whole run.
    done : RecordedRound
        The round, with the seconds since the first round began.
    """
    metrics = done.metrics
    name, form = FORMS[first_of(metrics)]
    value = metrics.get(first_of(metrics))
    figure = f"{name} " + ("     -" if value is None else f"{value:6{form}}")
    head = f"round {done.round:>{len(str(rounds))}}/{rounds} {done.phase:<6} "
    if done.epsilon is not None:
        return f"{head}{figure}  epsilon {done.epsilon:.2f}"
    left = done.seconds / done.round * (rounds - done.round)
    return (
        f"{head}clients {done.replied}/{len(done.cohort)}  loss {done.train_loss:.3f}  "
        f"{figure}  {done.payload_bytes / 1e6:.2f} MB  {clock(left)} left"
    )


def clock(seconds: float) -> str:
    """Return seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class CohortProgress:
    """Tells how many clients of a cohort have answered, while that takes long.

    Parameters
    ----------
    live : Live or None
        Where to tell it on a terminal, at once; None for the log, in ever fewer lines.
    first : float
        Seconds after which to begin; infinite for never.
    now : Callable
        Returns the time in seconds.
    """

    def __init__(
        self,
        live: Live | None = None,
        first: float = FIRST_SECONDS,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._live, self._first, self._now = live, first, now
        self._what, self._cohort = "", 0
        self._answered: set[int] = set()
        self._begun, self._next = 0.0, float("inf")

    @contextmanager
    def follow(self, what: str, cohort: int) -> Iterator[None]:
        """Follow what so many clients are asked to do."""
        self._what, self._cohort = what, cohort
        self._answered.clear()
        self._begun = self._now()
        self._next = self._first if self._live is None else 0.0
        try:
            yield
        finally:
            self._next = float("inf")

    def hear(self, clients: Iterable[int] = ()) -> None:
        """Count the clients that have answered, and tell their number if it is time."""
        self._answered.update(clients)
        passed = self._now() - self._begun
        if passed < self._next or len(self._answered) >= self._cohort:
            return
        told = (
            f"{self._what}: {len(self._answered)} of {counted(self._cohort, 'client')} "
            f"answered after {clock(passed)}"
        )
        if self._live is not None:
            self._live.hear("INFO", told)
        else:
            log(INFO, told)
            self._next = passed + max(self._first, _SHARE * passed)
