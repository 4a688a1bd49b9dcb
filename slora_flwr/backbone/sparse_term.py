"""A sparse term beside a packed layer's product: values at positions of its weight."""

import warnings
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from slora_flwr.backbone.quantised import weight_of
from slora_flwr.backbone.remade import keep_as_it_is, keep_input

# On a CPU, sparse products are faster than dense ones up to this density: measured on
# two cores, at every shape from 384 x 384 to 768 x 3072, for the gradient of a mask
# (benchmarks/masked_gradient.py).
SAMPLED_DENSITY = 0.1


class Mask(Protocol):
    """How the values of a term are trained."""

    def keep(self, x: Tensor) -> Tensor:
        """Return what of a layer's input the gradient needs."""

    def gradient(self, kept: Tensor, grad_y: Tensor) -> Tensor:
        """Return the gradient of the values, (k,), float32."""


class SparseTerm:
    """Have a packed layer compute y = Q(x) + x Sᵀ, with S at positions of its weight.

    S is `values` minus the weight that the layer unpacks. So the layer computes with
    `values` at the positions, and with its packed weight elsewhere.

    Parameters
    ----------
    module : nn.Linear
        The layer, whose output a hook changes until `remove`.
    positions : NDArray[np.int64]
        Row-major positions, ascending, (k,).
    values : Tensor
        The weights at these positions, (k,), float32. If they are changed, so is what
        the layer computes.
    mask : Mask or None
        How the values are trained; None if they are frozen.
    pattern : Tensor or None
        The positions as returned by `sparse_pattern`, if they are at hand.

    Attributes
    ----------
    before : Tensor
        The unpacked weights at the positions, (k,), float32.
    """

    def __init__(
        self,
        module: nn.Linear,
        positions: NDArray[np.int64],
        values: Tensor,
        mask: Mask | None = None,
        pattern: Tensor | None = None,
    ) -> None:
        self._shape = (module.out_features, module.in_features)
        self.positions = torch.from_numpy(positions).to(module.weight.device)
        self.values, self.mask = values, mask
        self.before = weight_of(module).reshape(-1)[self.positions].float()
        self._pattern = pattern
        if pattern is None and is_sampled(self.positions, self._shape):
            self._pattern = sparse_pattern(self.positions, self._shape)
        self._terms: list[SparseTerm] = vars(module).setdefault("sparse_terms", [])
        self._terms.append(self)
        self._hook = module.register_forward_hook(self._add)

    def remove(self) -> None:
        """Have the layer compute with its packed weight alone."""
        self._hook.remove()
        self._terms.remove(self)

    def _add(self, module: nn.Module, given: tuple[Tensor], y: Tensor) -> Tensor:
        term: Tensor = _Product.apply(given[0], self.values, self)
        return y + term.to(y.dtype)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Return S, (out, in): sparse where that is faster."""
        change = (self.values.detach() - self.before).to(dtype)
        if self._pattern is None:
            dense = change.new_zeros(self._shape)
            dense.view(-1).index_copy_(0, self.positions, change)
            return dense
        rows, columns = self._pattern.crow_indices(), self._pattern.col_indices()
        return torch.sparse_csr_tensor(
            rows, columns, change, self._shape, check_invariants=False
        )


class _Product(torch.autograd.Function):
    """x Sᵀ, with gradients for x and, if they are trained, for the values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, term: SparseTerm) -> Tensor:
        device = x.device.type
        given = x
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        ctx.term, ctx.make = term, keep_as_it_is
        kept = None if term.mask is None else term.mask.keep(x)
        if kept is x:  # and no slice, smaller than what x is made from
            kept, ctx.make = keep_input(given, x)
        ctx.save_for_backward(kept)
        return _multiply(x, term.matrix(_type(x)))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        term: SparseTerm = ctx.term
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = _multiply(grad_y, term.matrix(_type(grad_y)).t())
        if ctx.needs_input_grad[1]:
            assert term.mask is not None
            kept = ctx.make(*ctx.saved_tensors)
            rows = grad_y.flatten(0, -2).to(kept.dtype)
            grad_values = term.mask.gradient(kept.flatten(0, -2), rows)
        return grad_x, grad_values, None


def _type(x: Tensor) -> torch.dtype:
    # Sparse products are float32: CPUs have none in bf16.
    return x.dtype if x.device.type != "cpu" else torch.float32


def _multiply(x: Tensor, s: Tensor) -> Tensor:
    """Compute x Sᵀ for a sparse or a dense S, in the type of S."""
    with torch.autocast(x.device.type, enabled=False):
        if s.layout == torch.strided:
            return F.linear(x.to(s.dtype), s)
        rows = x.flatten(0, -2).to(s.dtype)
        return (s @ rows.T).T.unflatten(0, x.shape[:-1])


def is_sampled(positions: Tensor, shape: tuple[int, int]) -> bool:
    """Return whether sparse products are the faster ones at a mask's positions."""
    share = len(positions) / (shape[0] * shape[1])
    return positions.device.type == "cpu" and share <= SAMPLED_DENSITY


def sparse_pattern(positions: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return a sparse CSR matrix of zeros at a mask's sorted positions."""
    rows, columns = positions // shape[1], positions % shape[1]
    starts = torch.bincount(rows, minlength=shape[0]).cumsum(0)
    starts = torch.cat([starts.new_zeros(1), starts])
    zeros = torch.zeros(len(positions), device=positions.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in")
        return torch.sparse_csr_tensor(
            starts, columns, zeros, shape, check_invariants=False
        )
