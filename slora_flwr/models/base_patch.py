"""What a handoff changes of the backbone: the base of the low-rank phase."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slora_flwr.models.backbone import Backbone


@dataclass
class BasePatch:
    """W_base = W_0 with the sparse phase's values, minus s·B·A of the start.

    Attributes
    ----------
    positions : dict[str, NDArray[np.int64]]
        For each target matrix, the mask's row-major positions, (k,).
    values : dict[str, Tensor]
        The weights there, (k,), float32.
    a, b : dict[str, Tensor]
        The factors that the low-rank phase starts from, (rank, in) and (out, rank);
        empty where the base keeps them (`warm-start`).
    scaling : float
        s.
    """

    positions: dict[str, NDArray[np.int64]]
    values: dict[str, Tensor]
    a: dict[str, Tensor] = field(default_factory=dict)
    b: dict[str, Tensor] = field(default_factory=dict)
    scaling: float = 1.0
    _before: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def apply(self, backbone: Backbone) -> None:
        """Turn the resident W_0 into the base; no adapter may be attached."""
        assert not self._before, "the patch is applied already"
        with torch.no_grad():
            for name, module in backbone.targets.items():
                weight = module.weight
                self._before[name] = weight.detach().clone()
                at = torch.from_numpy(self.positions[name]).to(weight.device)
                values = self.values[name].to(weight.device, weight.dtype)
                weight.view(-1).index_copy_(0, at, values)
                if name in self.a:
                    product = (self.b[name] @ self.a[name]) * self.scaling
                    weight.sub_(product.to(weight.device, weight.dtype))

    def remove(self, backbone: Backbone) -> None:
        """Give W_0 back, bit for bit."""
        with torch.no_grad():
            for name, before in self._before.items():
                backbone.targets[name].weight.copy_(before)
        self._before = {}

    def state(self) -> dict[str, Tensor]:
        """List what travels to a node that has only W_0 and the mask's seed."""
        return {
            f"{name}.{part}": tensors[name]
            for name in self.values
            for part, tensors in (("values", self.values), ("a", self.a), ("b", self.b))
            if name in tensors
        }

    @staticmethod
    def shapes(
        backbone: Backbone, positions: dict[str, NDArray[np.int64]], rank: int
    ) -> dict[str, tuple[int, ...]]:
        """Give the layout of `state`; rank 0 for a base without factors."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, module in backbone.targets.items():
            shapes[f"{name}.values"] = (len(positions[name]),)
            if rank:
                shapes[f"{name}.a"] = (rank, module.in_features)
                shapes[f"{name}.b"] = (module.out_features, rank)
        return shapes

    @classmethod
    def from_state(
        cls,
        state: dict[str, Tensor],
        positions: dict[str, NDArray[np.int64]],
        scaling: float,
    ) -> "BasePatch":
        """Build a patch from its `state`."""
        parts: dict[str, dict[str, Tensor]] = {"values": {}, "a": {}, "b": {}}
        for key, tensor in state.items():
            name, part = key.rsplit(".", 1)
            parts[part][name] = tensor
        return cls(positions, parts["values"], parts["a"], parts["b"], scaling)
