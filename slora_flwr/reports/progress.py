"""The progress line printed after each round."""

from slora_flwr.reports.figures import FORMS, first_of
from slora_flwr.runs.events import RecordedRound


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
