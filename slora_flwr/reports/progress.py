"""Progress: the line printed after each round, and those within a long one."""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from logging import INFO

from flwr.common.logger import log

from slora_flwr.common.text import counted
from slora_flwr.reports.figures import FORMS, first_of
from slora_flwr.reports.live_line import LiveLine
from slora_flwr.runs.events import RecordedRound

# A round that takes longer tells how far it is: after so many seconds, and again after
# as many more or a quarter more of the time, whichever is later.
FIRST_SECONDS = 10.0
_SHARE = 0.25
_WITHIN = re.compile(r"\d+/\d+ .*: \d+ of \d+ clients? answered after [\d:]+\Z")


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


def is_within_round(line: str) -> bool:
    """Return whether a line of the log is one of `CohortProgress`."""
    return _WITHIN.search(line) is not None


class CohortProgress:
    """Tells how many clients of a cohort have answered, while that takes long.

    Parameters
    ----------
    live : LiveLine or None
        Where to tell it on a terminal; None for the log, in ever fewer lines.
    first : float
        Seconds after which to begin; infinite for never.
    now : Callable
        Returns the time in seconds.
    """

    def __init__(
        self,
        live: LiveLine | None = None,
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
        self._begun, self._next = self._now(), self._first
        try:
            yield
        finally:
            self._next = float("inf")
            if self._live is not None:
                self._live.hide()

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
            self._live.show(told)
        else:
            log(INFO, told)
            self._next = passed + max(self._first, _SHARE * passed)
