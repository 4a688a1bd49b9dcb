"""Sparse fine-tuning: the masked entries of the target matrices, in place.

Stage 1 of SLoRA (arXiv 2308.06522): one random mask of uniform density, the same for
all clients, named by its seed.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from slora_flwr.adapters.head import HeadAdapter, State
from slora_flwr.adapters.masks import fingerprint, make_mask
from slora_flwr.models.backbone import Backbone


class SparseAdapter(HeadAdapter):
    """Train the values at a mask's positions.

    The state holds, for each target matrix, the weight's values at the mask's positions
    (`<module>.values`, shape (k,)), not their difference from W_0: writing them into
    the weight then loses no bits. While attached, each target module computes with its
    own resident weight, which `commit` updates at k entries; the optimiser sees k
    values, so it keeps no moments for the others and its weight decay cannot reach
    them.

    Parameters
    ----------
    density : float
        Share of the entries of each target matrix.
    structure : str
        Structure of the mask, see `masks.make_mask`.
    seed : int
        The seed that names the mask.
    """

    def __init__(self, density: float, structure: str, seed: int) -> None:
        super().__init__()
        self._density, self._structure, self._seed = density, structure, seed
        self._masks: dict[str, NDArray[np.int64]] = {}
        self._positions: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    def masks(self, backbone: Backbone) -> dict[str, NDArray[np.int64]]:
        """Draw the mask of each target matrix by its name."""
        return {
            name: make_mask(
                self._seed,
                name,
                (module.out_features, module.in_features),
                self._density,
                self._structure,
            )
            for name, module in backbone.targets.items()
        }

    def commit(self) -> None:
        """Write the trained values into the resident weights."""
        with torch.no_grad():
            for name, positions in self._positions.items():
                values = self._trained[f"{name}.values"]
                _flat(self.backbone.targets[name]).index_copy_(
                    0, positions, values.to(self.backbone.targets[name].weight.dtype)
                )

    def fingerprint(self) -> str:
        """Digest the masks, so that nodes with other masks are told apart."""
        return fingerprint(self._masks)

    def delta(self, state: State) -> State:
        """Give what a state changed of W_0 at the mask's positions, by module name.

        Parameters
        ----------
        state : State
            A state of this adapter, which must be attached.

        Returns
        -------
        State
            float32 values of shape (k,) for each target matrix.
        """
        return {
            name: state[f"{name}.values"] - before.float().cpu()
            for name, before in self._before.items()
        }

    def _make(self, backbone: Backbone) -> dict[str, nn.Parameter]:
        self._masks = self.masks(backbone)
        trained = {}
        for name, module in backbone.targets.items():
            positions = torch.from_numpy(self._masks[name]).to(module.weight.device)
            self._positions[name] = positions
            self._before[name] = _flat(module)[positions].clone()
            values = nn.Parameter(self._before[name].to(torch.float32, copy=True))
            trained[f"{name}.values"] = values
            module.forward = partial(_forward, module, values, positions)  # type: ignore[method-assign]
        return trained

    def _restore(self, backbone: Backbone) -> None:
        with torch.no_grad():
            for name, module in backbone.targets.items():
                _flat(module).index_copy_(0, self._positions[name], self._before[name])
                del module.forward  # the class's own forward shows again
        self._positions, self._before, self._masks = {}, {}, {}


def _flat(module: nn.Linear) -> Tensor:
    return module.weight.detach().view(-1)


def _forward(module: nn.Linear, values: Tensor, positions: Tensor, x: Tensor) -> Tensor:
    return _MaskedLinear.apply(x, values, module.weight, module.bias, positions)


class _MaskedLinear(torch.autograd.Function):
    """y = x Wᵀ + b, with a gradient for W's entries at `positions` alone.

    The weight's dense gradient exists only inside one call of `backward`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        positions: Tensor,
    ) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        ctx.save_for_backward(x, positions)
        # `commit` changes the weight in place between steps, never between a forward
        # and its backward, so it needs no version check.
        ctx.weight = weight
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, positions = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ ctx.weight.to(grad_y.dtype)
        dense = grad_y.flatten(0, -2).T @ x.flatten(0, -2)
        grad_values = dense.reshape(-1)[positions].float()
        return grad_x, grad_values, None, None, None
