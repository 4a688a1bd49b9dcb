"""Answer cases with code that averages named arrays and knows nothing of LoRA."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedlora_conformance.run import Answer, Case

Arrays = dict[str, NDArray[np.float32]]
Mean = Callable[[Arrays, list[Arrays], list[int]], Mapping[str, ArrayLike]]

# What a mean of everything that clients return is right for: a factor that nobody
# trained is the same in all answers.
AVERAGED = ("fedavg", "ffa", "alternate")


def average(case: Case, mean: Mean) -> Answer:
    """Answer a case by the mean of all that clients return, frozen factors included.

    Parameters
    ----------
    case : dict
        A case as the runner passes it.
    mean : Callable
        Called in each round with what the server sent, what each client returned, and
        each client's number of examples; returns the new arrays. Names are such as
        `query.A`, `query.B` and `head`; arrays are float32.

    Raises
    ------
    NotImplementedError
        If the case's aggregator is more than a mean of arrays.
    """
    if case["aggregator"] not in AVERAGED:
        raise NotImplementedError
    start, s = case["start"], case["scaling"]["s"]
    state, answers = _named(start), []
    for current in case["rounds"]:
        clients = current["clients"]
        examples = [client["examples"] for client in clients]
        after = mean(state, [_named(client) for client in clients], examples)
        state = {name: np.array(after[name], dtype=np.float32) for name in state}
        wide = {name: value.astype(np.float64) for name, value in state.items()}
        effective = {
            name: layer["W"] + s * wide[f"{name}.B"] @ wide[f"{name}.A"]
            for name, layer in start["layers"].items()
        }
        answers.append({"effective": effective, "head": wide["head"]})
    return answers


def _named(result: dict[str, Any]) -> Arrays:
    layers = result["layers"].items()
    named = {f"{name}.{f}": layer[f] for name, layer in layers for f in "AB"}
    named["head"] = result["head"]
    return {name: value.astype(np.float32) for name, value in named.items()}
