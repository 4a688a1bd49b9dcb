"""The base of a phase: the frozen weights that its adapter stands on."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slora_flwr.backbone.load import Backbone
from slora_flwr.backbone.quantised import is_quantised, weight_of
from slora_flwr.backbone.sparse_term import SparseTerm


@dataclass
class BaseWeights:
    """W_base = W_0 with the sparse phase's values, minus s·B·A of the start.

    All parts may be empty; the base is then W_0. The values are written into the
    resident weights, rounded to these weights' type as the sparse phase computed with
    them; beside packed weights they are sparse terms. The factors stay factors, whose
    product the low-rank adapter subtracts: W_0 minus a dense product would round all of
    the weights.

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
        What restores W_0 while the base is applied: its entries at the positions, or
        its target matrices if rounds change the base.
    terms : list[SparseTerm]
        While the base is applied, what stands beside packed weights.
    """

    positions: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    a: dict[str, Tensor] = field(default_factory=dict)
    b: dict[str, Tensor] = field(default_factory=dict)
    scaling: float = 1.0
    weights: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict, repr=False)
    terms: list[SparseTerm] = field(default_factory=list, repr=False)

    def apply(self, backbone: Backbone, *, changes: bool = False) -> dict[str, Tensor]:
        """Change the resident W_0 to the base; no adapter may be attached.

        Parameters
        ----------
        backbone : Backbone
            The backbone with W_0.
        changes : bool
            True if rounds change the base. The weights then hold all of it, minus
            s·B·A too, and W_0's target matrices are kept aside.

        Returns
        -------
        dict[str, Tensor]
            The frozen factors that the adapter is to use, as `factors` names them.
        """
        applied = self.before or self.terms
        assert not applied, "the base is applied already"
        with torch.no_grad():
            for name, module in backbone.targets.items():
                if is_quantised(module):  # which no round changes
                    if name in self.values:
                        values = self.values[name].to(module.weight.device)
                        term = SparseTerm(module, self.positions[name], values)
                        self.terms.append(term)
                    continue
                weight = module.weight
                if changes:
                    self.before[name] = weight.detach().clone()
                if name in self.weights:
                    weight.copy_(self.weights[name])
                if name in self.values:
                    at = torch.from_numpy(self.positions[name]).to(weight.device)
                    if not changes:
                        self.before[name] = weight.view(-1)[at]
                    values = self.values[name].to(weight.device, weight.dtype)
                    weight.view(-1).index_copy_(0, at, values)
                if changes and name in self.b:
                    product = (self.b[name] @ self.a[name]) * self.scaling
                    weight.sub_(product.to(weight.device, weight.dtype))
        return self.factors("a" if changes else "ab")

    def remove(self, backbone: Backbone) -> None:
        """Restore W_0, bit for bit, even if rounds have changed the base."""
        with torch.no_grad():
            for name, before in self.before.items():
                weight = backbone.targets[name].weight
                if before.shape == weight.shape:
                    weight.copy_(before)
                else:
                    at = torch.from_numpy(self.positions[name]).to(weight.device)
                    weight.view(-1).index_copy_(0, at, before)
        for term in self.terms:
            term.remove()
        self.before, self.terms = {}, []

    def factors(self, which: str = "ab") -> dict[str, Tensor]:
        """Return the named factors by their names in a low-rank adapter's state."""
        return {
            f"{name}.lora_{factor.upper()}": tensor
            for factor in which
            for name, tensor in (self.a if factor == "a" else self.b).items()
        }

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


def entries_of(module: nn.Linear, positions: NDArray[np.int64]) -> Tensor:
    """Return what a layer's weight is at row-major positions, float32 on the CPU."""
    return take_entries(weight_of(module), positions)


def take_entries(weight: Tensor, positions: NDArray[np.int64]) -> Tensor:
    """Return a weight's entries at row-major positions, float32 on the CPU."""
    at = torch.from_numpy(positions).to(weight.device)
    return weight.detach().reshape(-1)[at].float().cpu()
