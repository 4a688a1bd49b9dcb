"""The line that says how a run stands after a round."""


def progress_line(
    rounds: int, phase: str, figures: dict[str, float], asked: int
) -> str:
    """Write a round's line.

    Parameters
    ----------
    rounds : int
        Rounds of the whole run.
    phase : str
        The phase's name.
    figures : dict[str, float]
        `round`, `replied` (clients), `train_loss`, `seconds` and `payload_bytes` so
        far; `accuracy` where the round was evaluated, `epsilon` where privacy is on.
    asked : int
        Clients of the cohort.
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
    """Write seconds as m:ss, or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
