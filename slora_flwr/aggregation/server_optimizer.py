"""The server's optimiser: one step from the mean update to the next state."""

from collections.abc import Mapping

import torch
from torch import Tensor

from slora_flwr.runs.snapshot import Snapshot


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
            self._begin(state)
        assert self._optimizer is not None
        for name, parameter in self._parameters.items():
            parameter.data.copy_(state[name])
            # None for what a round does not train: it stays, and so do its moments.
            parameter.grad = -update[name] if name in update else None
        self._optimizer.step()
        return {name: p.detach().clone() for name, p in self._parameters.items()}

    def snapshot(self) -> Snapshot:
        """Give what `restore` takes: the moments."""
        kept = self._optimizer.state if self._optimizer else {}
        moments = {
            f"{name}.{moment}": tensor
            for name, parameter in self._parameters.items()
            for moment, tensor in kept.get(parameter, {}).items()
        }
        return Snapshot(tensors=moments)

    def restore(self, state: Mapping[str, Tensor], snapshot: Snapshot) -> None:
        """Go on from there, for parameters like those of a state."""
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
