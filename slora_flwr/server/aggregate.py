"""Aggregation: folds of updates whose order and grouping do not matter."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Mean:
    """The mean of updates weighted by examples: FedAvg (arXiv 1602.05629).

    The same object folds a node's clients and the server's nodes: the mean of means,
    each with its total weight, is the mean of all. Sums are float64, so that the order
    of a cohort does not show in float32.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self.weight = 0

    def add(self, update: Mapping[str, Tensor], weight: int) -> None:
        """Add an update, or another fold's result with its weight."""
        for name, tensor in update.items():
            if name in self._sums:
                self._sums[name].add_(tensor.double(), alpha=weight)
            else:
                self._sums[name] = tensor.double() * weight
        self.weight += weight

    def result(self) -> dict[str, Tensor]:
        """Give the mean so far, float32."""
        return {name: (s / self.weight).float() for name, s in self._sums.items()}


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
