"""Plain PyTorch and PEFT: the clients one after the other, and the mean of each round.

The model is loaded once, and nothing is serialised.
"""

from collections.abc import Callable
from statistics import fmean

from work import Work, load_state, mean_of, read_state


def train(work: Work, ended: Callable[[], None]) -> list[float]:
    """Train all rounds; return the mean loss of each."""
    model = work.make_model()
    state, found = read_state(model), []
    for clients in work.batches:
        states, losses = [], []
        for batches in clients:
            load_state(model, state)
            losses.append(work.train_client(model, batches))
            states.append(read_state(model))
        state = mean_of(states)
        found.append(fmean(losses))
        ended()
    return found
