"""The running average of the global states."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from slora_flwr.adapters.priming import prime
from slora_flwr.common.svd import truncated_product
from slora_flwr.common.tensors import State
from slora_flwr.runs.snapshot import Snapshot


def share_of(rule: str, decay: float) -> Callable[[int], float]:
    """Return a rule of `server.average`: the share of state n in average n.

    - `none`: 1. The average is the state itself.
    - `growing`: 3 / (n + 2), polynomial-decay averaging (Shamir and Zhang, arXiv
      1212.1824) with exponent 2: state n weighs n · (n + 1). The window grows with the
      run, so that the average neither lags early nor is noisy late.
    - `ema`: 1 - `decay`, an exponential moving average. It is 1 / n while that is
      larger, so that the first states weigh the same.

    Averages of iterates: Polyak and Juditsky (SIAM J. Control Optim. 30, 1992), SWA
    (arXiv 1803.05407). Here each round is an iterate.
    """
    match rule:
        case "growing":
            return lambda n: 3 / (n + 2)
        case "ema":
            return lambda n: max(1 / n, 1 - decay)
    return lambda n: 1.0


def mix(average: State, state: State, share: float) -> State:
    """Return (1 - share) · average + share · state.

    Of LoRA's factors, the products B·A are mixed, and the result is the best factors of
    their rank. Factors alone have no mean where a round computes them anew, since their
    basis then differs from round to round.
    """
    pairs = {}
    for name in [n.removesuffix(".lora_A") for n in state if n.endswith(".lora_A")]:
        a, b = f"{name}.lora_A", f"{name}.lora_B"
        if b in state:
            old, new = average[b].double() * (1 - share), state[b].double() * share
            right = torch.cat([average[a], state[a]]).double()
            svd = truncated_product(torch.cat([old, new], 1), right, len(state[a]))
            pairs[a], pairs[b] = prime(svd, 1.0, "balanced")
    return {
        name: pairs[name] if name in pairs else torch.lerp(average[name], tensor, share)
        for name, tensor in state.items()
    }


class AveragedState:
    """The running average of the states with which rounds end.

    It is evaluated and exported. Training goes on from the states themselves.

    Parameters
    ----------
    rule, decay
        As for `share_of`.

    Attributes
    ----------
    state : State
        The average; empty before the first round.
    weights : State
        The average of the base's target matrices, float32 on the CPU. Empty if rounds
        do not change the base, or the average is the last state itself.
    rounds : int
        Number of states in the average.
    """

    def __init__(self, rule: str, decay: float) -> None:
        self.state: State = {}
        self.weights: State = {}
        self.rounds = 0
        self._share = share_of(rule, decay)

    def begin(self, state: State, weights: Mapping[str, Tensor], rounds: int) -> None:
        """Begin with a state that computes what the average of some rounds did.

        Parameters
        ----------
        state, weights
            As for `add`.
        rounds : int
            Number of states that it stands for.
        """
        self.rounds = rounds
        self.state = state
        self.weights = {name: _copy(weight) for name, weight in weights.items()}

    def add(
        self, state: State, weights: Mapping[str, Tensor], scaling: float = 1.0
    ) -> None:
        """Add the state after a round.

        What the rank of LoRA's factors cuts off their average goes into the average of
        the weights, if there is one. The two are then the exact average.

        Parameters
        ----------
        state : State
            The state; it must not change afterwards.
        weights : Mapping[str, Tensor]
            The base's target matrices if rounds change the base, else empty.
        scaling : float
            LoRA's s.
        """
        self.rounds += 1
        share, before = self._share(self.rounds), self.state
        if share == 1:
            self.begin(state, weights, self.rounds)
            return
        self.state = mix(before, state, share)
        for name, weight in weights.items():
            average = self.weights[name].lerp_(_copy(weight), share)
            if f"{name}.lora_A" in state and f"{name}.lora_B" in state:
                cut = (1 - share) * _product(before, name) - _product(self.state, name)
                average.add_(cut + share * _product(state, name), alpha=scaling)

    def snapshot(self) -> Snapshot:
        """Return a snapshot for `restore`."""
        # The file must not hold the last state twice.
        is_last = self.rounds == 0 or self._share(self.rounds) == 1
        parts = {
            "rounds": Snapshot({"rounds": self.rounds}),
            "state": Snapshot(tensors={} if is_last else self.state),
            "weights": Snapshot(tensors=self.weights),
        }
        return Snapshot.join(parts)

    def restore(self, snapshot: Snapshot, last: State) -> None:
        """Restore a snapshot that was taken after the state `last` was added."""
        self.rounds = snapshot.part("rounds").facts["rounds"]
        self.state = snapshot.part("state").tensors or last
        self.weights = snapshot.part("weights").tensors


def _product(state: State, name: str) -> Tensor:
    return state[f"{name}.lora_B"] @ state[f"{name}.lora_A"]


def _copy(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float32, copy=True)
