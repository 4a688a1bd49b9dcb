"""The server's optimiser, which turns the mean update into the next state."""

from collections.abc import Mapping

import torch
from torch import Tensor

from slora_flwr.runs.snapshot import Snapshot

# What `server.lr` 0 stands for: measured, see "Rates of the server" in docs/results.md.
DEFAULT_RATES = {"none": 1.0, "fedavgm": 0.3, "fedadam": 0.01}


class ServerOptimizer:
    """An optimiser whose gradient is the negative mean update.

    `none` adds `lr` times the mean. `fedavgm` (arXiv 1909.06335) is torch's SGD with
    momentum 0.9. `fedadam` (arXiv 2003.00295) is torch's Adam with the paper's
    beta_2 = 0.99 and tau = 1e-3. Each phase has a new optimiser, and so new moments,
    since a handoff replaces the parameters.

    Parameters
    ----------
    name : str
        `none`, `fedavgm` or `fedadam`.
    lr : float
        The server's learning rate; 0 for the optimiser's default.
    """

    def __init__(self, name: str, lr: float) -> None:
        self._name, self._lr = name, lr or DEFAULT_RATES[name]
        self._optimizer: torch.optim.Optimizer | None = None
        self._parameters: dict[str, torch.nn.Parameter] = {}

    def step(
        self, state: Mapping[str, Tensor], update: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the state after one step; the given state is not changed."""
        if not self._parameters:
            self._begin(state)
        assert self._optimizer is not None
        for name, parameter in self._parameters.items():
            parameter.data.copy_(state[name])
            # None for a parameter that the round did not train: neither it nor its
            # moments change.
            parameter.grad = -update[name] if name in update else None
        self._optimizer.step()
        return {name: p.detach().clone() for name, p in self._parameters.items()}

    def snapshot(self) -> Snapshot:
        """Return the moments, for `restore`."""
        kept = self._optimizer.state if self._optimizer else {}
        moments = {
            f"{name}.{moment}": tensor
            for name, parameter in self._parameters.items()
            for moment, tensor in kept.get(parameter, {}).items()
        }
        return Snapshot(tensors=moments)

    def restore(self, state: Mapping[str, Tensor], snapshot: Snapshot) -> None:
        """Continue with the snapshot's moments, for parameters like the state's."""
        self._begin(state)
        assert self._optimizer is not None
        for key, tensor in snapshot.tensors.items():
            name, moment = key.rsplit(".", 1)
            self._optimizer.state[self._parameters[name]][moment] = tensor

    def _begin(self, state: Mapping[str, Tensor]) -> None:
        self._parameters = {
            name: torch.nn.Parameter(tensor.clone()) for name, tensor in state.items()
        }
        self._optimizer = self._make(list(self._parameters.values()))

    def _make(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        if self._name == "fedadam":
            return torch.optim.Adam(
                parameters, lr=self._lr, betas=(0.9, 0.99), eps=1e-3
            )
        momentum = 0.9 if self._name == "fedavgm" else 0.0
        return torch.optim.SGD(parameters, lr=self._lr, momentum=momentum)
