"""Aggregation: folds of updates whose order and grouping do not matter."""

from collections.abc import Mapping

import torch
from torch import Tensor

# Sums are whole multiples of 1 / SCALE. With weights of at least 1 that is finer than
# float32 resolves an update of 1e-2, and leaves room for sums up to 2^32.
SCALE = 2.0**30
LARGEST = 2**62


class FoldError(ValueError):
    """An update that is not finite, or too large to be summed exactly."""


class Mean:
    """The mean of updates weighted by examples: FedAvg (arXiv 1602.05629).

    The same object folds a node's clients and the server's nodes. It sums in whole
    numbers, which no order or grouping changes, so the mean is the same bit for bit
    however many nodes share a cohort and whoever answers first.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.weight = 0

    def add(self, update: Mapping[str, Tensor], weight: int) -> None:
        """Add one client's update.

        Parameters
        ----------
        update : Mapping[str, Tensor]
            float32, the same names and shapes each time.
        weight : int
            The client's number of examples, above 0.

        Raises
        ------
        FoldError
            If a value is not finite or weight times it is beyond 2^32.
        """
        scaled = {name: t.double() * (weight * SCALE) for name, t in update.items()}
        for name, tensor in scaled.items():
            _check_range(name, tensor)
        self.merge({name: t.round_().long() for name, t in scaled.items()}, weight)

    def merge(self, sums: Mapping[str, Tensor], weight: int) -> None:
        """Add another fold's sums, int64, and its weight.

        Raises
        ------
        FoldError
            If a sum leaves the range.
        """
        after = {}
        for name, tensor in sums.items():
            # Two terms below 2^62 cannot pass 2^63 unseen.
            _check_range(name, tensor)
            after[name] = tensor + self.sums.get(name, 0)
            _check_range(name, after[name])
        self.sums, self.weight = after, self.weight + weight

    def result(self) -> dict[str, Tensor]:
        """Give the mean so far, float32."""
        share = 1.0 / (self.weight * SCALE)
        return {name: (s.double() * share).float() for name, s in self.sums.items()}


def _check_range(name: str, tensor: Tensor) -> None:
    # Both comparisons are false for NaN.
    if not bool(((tensor > -LARGEST) & (tensor < LARGEST)).all()):
        raise FoldError(f"the update of {name} is not finite or too large")


class ServerOptimizer:
    """What the server does with the mean update.

    `none` adds `lr` times the mean. `fedavgm` (arXiv 1909.06335) and `fedadam` (arXiv
    2003.00295) hand its negative as a gradient to torch's SGD with momentum 0.9, and to
    torch's Adam with the paper's beta_2 = 0.99 and tau = 1e-3. Moments live as long as
    the object: one phase, since a handoff changes what the parameters are.

    Parameters
    ----------
    name : str
        `none`, `fedavgm` or `fedadam`.
    lr : float
        Its learning rate.
    """

    def __init__(self, name: str, lr: float) -> None:
        self._name, self._lr = name, lr
        self._optimizer: torch.optim.Optimizer | None = None
        self._parameters: dict[str, torch.nn.Parameter] = {}

    def step(
        self, state: Mapping[str, Tensor], update: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Give the state after one step; the state passed in stays as it is."""
        if not self._parameters:
            self._parameters = {
                name: torch.nn.Parameter(tensor.clone())
                for name, tensor in state.items()
            }
            self._optimizer = self._make(list(self._parameters.values()))
        assert self._optimizer is not None
        for name, parameter in self._parameters.items():
            parameter.data.copy_(state[name])
            parameter.grad = -update[name]
        self._optimizer.step()
        return {name: p.detach().clone() for name, p in self._parameters.items()}

    def _make(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        if self._name == "fedadam":
            return torch.optim.Adam(
                parameters, lr=self._lr, betas=(0.9, 0.99), eps=1e-3
            )
        momentum = 0.9 if self._name == "fedavgm" else 0.0
        return torch.optim.SGD(parameters, lr=self._lr, momentum=momentum)
