"""The base of a low-rank phase: what a handoff changes in the backbone."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slora_flwr.backbone.load import Backbone


@dataclass
class BaseWeights:
    """W_base = W_0 with the sparse phase's values, minus s·B·A of the start.

    All parts may be empty. The base is then W_0, which can be changed and restored.

    Attributes
    ----------
    positions : dict[str, NDArray[np.int64]]
        Row-major positions of the mask in each target matrix, (k,).
    values : dict[str, Tensor]
        The weights at these positions, (k,), float32.
    a, b : dict[str, Tensor]
        The factors that the low-rank phase starts from, (rank, in) and (out, rank);
        empty if the base does not subtract them (`warm-start`). A without B is a
        frozen A on base W_0.
    scaling : float
        LoRA's s.
    weights : dict[str, Tensor]
        The base itself, (out, in), instead of all of the above.
    before : dict[str, Tensor]
        W_0's target matrices while the base is applied.
    """

    positions: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    a: dict[str, Tensor] = field(default_factory=dict)
    b: dict[str, Tensor] = field(default_factory=dict)
    scaling: float = 1.0
    weights: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def apply(self, backbone: Backbone) -> None:
        """Change the resident W_0 to the base; no adapter may be attached."""
        assert not self.before, "the base is applied already"
        with torch.no_grad():
            for name, module in backbone.targets.items():
                weight = module.weight
                self.before[name] = weight.detach().clone()
                if name in self.weights:
                    weight.copy_(self.weights[name])
                if name in self.values:
                    at = torch.from_numpy(self.positions[name]).to(weight.device)
                    values = self.values[name].to(weight.device, weight.dtype)
                    weight.view(-1).index_copy_(0, at, values)
                if name in self.b:
                    product = (self.b[name] @ self.a[name]) * self.scaling
                    weight.sub_(product.to(weight.device, weight.dtype))

    def remove(self, backbone: Backbone) -> None:
        """Restore W_0, bit for bit, even if rounds have changed the base."""
        with torch.no_grad():
            for name, before in self.before.items():
                backbone.targets[name].weight.copy_(before)
        self.before = {}

    def factors(self) -> dict[str, Tensor]:
        """Return `a` and `b` by their names in a low-rank adapter's state."""
        named = {f"{name}.lora_A": tensor for name, tensor in self.a.items()}
        return named | {f"{name}.lora_B": tensor for name, tensor in self.b.items()}

    def state(self) -> dict[str, Tensor]:
        """Return what is sent to a node that has only W_0 and the mask's seed."""
        return {
            f"{name}.{part}": tensors[name]
            for name in self.values or self.a
            for part, tensors in (("values", self.values), ("a", self.a), ("b", self.b))
            if name in tensors
        }

    @staticmethod
    def shapes(
        backbone: Backbone,
        positions: dict[str, NDArray[np.int64]],
        rank: int,
        factors: str = "ab",
    ) -> dict[str, tuple[int, ...]]:
        """Return the layout of `state`, which holds the named factors."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, module in backbone.targets.items():
            if name in positions:
                shapes[f"{name}.values"] = (len(positions[name]),)
            if "a" in factors:
                shapes[f"{name}.a"] = (rank, module.in_features)
            if "b" in factors:
                shapes[f"{name}.b"] = (module.out_features, rank)
        return shapes

    @classmethod
    def from_state(
        cls,
        state: dict[str, Tensor],
        positions: dict[str, NDArray[np.int64]],
        scaling: float,
    ) -> "BaseWeights":
        """Return the base with the given `state`."""
        parts: dict[str, dict[str, Tensor]] = {"values": {}, "a": {}, "b": {}}
        for key, tensor in state.items():
            name, part = key.rsplit(".", 1)
            parts[part][name] = tensor
        return cls(positions, parts["values"], parts["a"], parts["b"], scaling)
