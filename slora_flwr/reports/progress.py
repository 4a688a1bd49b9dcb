"""The progress line printed after each round."""


def progress_line(
    rounds: int, phase: str, figures: dict[str, float], asked: int
) -> str:
    """Return the progress line of a round.

    Parameters
    ----------
    rounds : int
        Number of rounds of the whole run.
    phase : str
        Name of the phase.
    figures : dict[str, float]
        `round`, `replied` (clients), `train_loss`, `seconds` and `payload_bytes` so
        far; `accuracy` if the round was evaluated; `epsilon` with privacy.
    asked : int
        Number of clients in the cohort.
    """
    number = int(figures["round"])
    accuracy = f"{figures['accuracy']:6.1%}" if "accuracy" in figures else "     -"
    spent = f"epsilon {figures['epsilon']:.2f}  " if "epsilon" in figures else ""
    left = figures["seconds"] / number * (rounds - number)
    return (
        f"round {number:>{len(str(rounds))}}/{rounds} {phase:<6} "
        f"clients {int(figures['replied'])}/{asked}  loss {figures['train_loss']:.3f}  "
        f"accuracy {accuracy}  {figures['payload_bytes'] / 1e6:.2f} MB  "
        f"{spent}{clock(left)} left"
    )


def clock(seconds: float) -> str:
    """Return seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
