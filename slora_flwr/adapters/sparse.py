"""Sparse fine-tuning: the masked entries of the target matrices, in place.

Stage 1 of SLoRA (arXiv 2308.06522): one random mask of uniform density, the same for
all clients, named by its seed.
"""

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from slora_flwr.adapters.base import Adapter, require_float32, require_targets
from slora_flwr.adapters.masks import (
    deal_densities,
    draw_lines,
    fingerprint,
    mask_size,
    positions,
)
from slora_flwr.backbone.load import Backbone
from slora_flwr.common.tensors import State
from slora_flwr.config import RunConfig, refuse
from slora_flwr.config.schedule import Phase

# On a CPU, masks of up to this density are quicker to sample than to gather from the
# dense gradient, at every shape from 384 x 384 to 768 x 3072, on two cores
# (benchmarks/masked_gradient.py).
SAMPLED_DENSITY = 0.1


class SparseAdapter(Adapter):
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
        Share of the entries of the target matrices.
    structure : str
        Structure of the mask, see `masks.draw_lines`. Of `rows` and `columns` only
        their slice of the weight's gradient is computed; `columns` also keeps only
        their slice of the activations.
    seed : int
        The seed that names the mask.
    budget : str
        How the density is dealt to the matrices, see `masks.deal_densities`.
    redrawn : bool
        Whether each round has a mask of its own. Then the base moves by what a round
        trained, and its start need not travel: the values are the base's.
    """

    default_lr = 1e-2
    section = "sparse"
    is_selection = True
    learns_delta = True

    def __init__(
        self,
        density: float,
        structure: str,
        seed: int,
        budget: str = "uniform",
        redrawn: bool = False,
    ) -> None:
        super().__init__()
        self._density, self._structure, self._seed = density, structure, seed
        self._budget, self._redrawn = budget, redrawn
        self._number = 0  # of the round that the mask is for, 0 for all
        self._lines: dict[str, Tensor] = {}
        self._fingerprint = ""
        self._before: dict[str, Tensor] = {}

    @classmethod
    def from_config(cls, config: RunConfig, frozen: State | None = None) -> Self:
        """Return an adapter of the run, not attached yet."""
        sparse, redrawn = config.sparse, cls.changes_base(config)
        return cls(sparse.density, sparse.mask, config.seed, sparse.budget, redrawn)

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Refuse what masks drawn anew each round cannot run with."""
        if not cls.changes_base(config):
            return
        writes = ", since sparse.schedule per-round writes to the weights"
        require_float32(config, writes)
        if config.server.optimizer != "none":
            # Moments of one round's weights would move the next one's.
            allowed = "none, since sparse.schedule is per-round"
            raise refuse("server.optimizer", config.server.optimizer, allowed)

    @classmethod
    def check_fit(cls, config: RunConfig, backbone: Backbone) -> None:
        """Refuse a backbone without target matrices."""
        require_targets(config, backbone)

    @classmethod
    def changes_base(cls, config: RunConfig) -> bool:
        """Return whether each round has a mask of its own."""
        return config.sparse.schedule == "per-round"

    @classmethod
    def state_size(cls, config: RunConfig, backbone: Backbone) -> int:
        """Return the number of values in a whole state, whatever is attached."""
        sparse = config.sparse
        shapes = {name: _shape(module) for name, module in backbone.targets.items()}
        densities = deal_densities(shapes, sparse.density, sparse.budget)
        return backbone.head_size + sum(
            mask_size(shape, densities[name], sparse.mask)
            for name, shape in shapes.items()
        )

    @classmethod
    def traffic(
        cls,
        phase: Phase,
        config: RunConfig,
        backbone: Backbone,
        phase_round: int,
        client: int,
    ) -> tuple[int, int]:
        """Return how many values a client is sent in a round and how many it returns.

        Values that the base holds already are not sent.
        """
        whole = cls.state_size(config, backbone)
        return (backbone.head_size if phase.changes_base else whole), whole

    @classmethod
    def change_size(
        cls, phase: Phase, config: RunConfig, backbone: Backbone, cohort: int
    ) -> int:
        """Return the number of values by which a round changes the base."""
        return cls.state_size(config, backbone) - backbone.head_size

    def masks(
        self, backbone: Backbone, rounds: int = 0
    ) -> dict[str, NDArray[np.int64]]:
        """Return what the mask of each target matrix covers: row-major positions.

        Parameters
        ----------
        backbone : Backbone
            The matrices.
        rounds : int
            Where each round has a mask of its own, the union of the first so many.
        """
        numbers = range(1, rounds + 1) if self._redrawn else (0,)
        masks = [self.mask_of(backbone, number) for number in numbers]
        if len(masks) == 1:
            return masks[0]
        return {
            name: np.unique(np.concatenate([mask[name] for mask in masks]))
            for name in backbone.targets
        }

    def begin(self, phase_round: int) -> None:
        """Draw the round's mask, where each round has its own."""
        if self._redrawn and phase_round != self._number:
            self.restore(self.backbone)
            self._number = phase_round
            self._trained |= self.make(self.backbone)

    def sent(self) -> dict[str, torch.Size]:
        """Leave out values that the base holds already."""
        shapes = self.shapes()
        if not self._redrawn:
            return shapes
        return {name: s for name, s in shapes.items() if not name.endswith(".values")}

    def complete(self, sent: State) -> State:
        """Add the base's values to what was sent."""
        if not self._redrawn:
            return sent
        values = {f"{name}.values": t.float().cpu() for name, t in self._before.items()}
        return values | sent

    def change_shapes(self, backbone: Backbone, rank: int) -> dict[str, torch.Size]:
        """Return the layout of a base change: the values under a round's mask."""
        shapes = self.mask_of(backbone, 1)
        return {f"{name}.values": torch.Size([len(p)]) for name, p in shapes.items()}

    def change(self, backbone: Backbone, change: State, phase_round: int) -> None:
        """Write the values that a round ended with into the base, while detached."""
        with torch.no_grad():
            for name, lines in self._draw(backbone, phase_round).items():
                weight = backbone.targets[name].weight
                at = torch.from_numpy(lines).to(weight.device)
                values = change[f"{name}.values"].to(weight.device, weight.dtype)
                _scatter(weight, at, values, self._structure)

    def commit(self) -> None:
        """Write the trained values into the resident weights."""
        with torch.no_grad():
            for name, lines in self._lines.items():
                weight = self.backbone.targets[name].weight
                values = self._trained[f"{name}.values"].to(weight.dtype)
                _scatter(weight, lines, values, self._structure)

    def learned(
        self, state: State, rounds: int
    ) -> tuple[dict[str, NDArray[np.int64]], State]:
        """Return the entries that so many rounds trained.

        Parameters
        ----------
        state : State
            The last round's, of this adapter, which must be attached.
        rounds : int
            Rounds of the phase so far.

        Returns
        -------
        positions : dict[str, NDArray[np.int64]]
            For each target matrix, row-major positions, (k,).
        values : State
            The weights there, (k,), float32.
        """
        positions = self.masks(self.backbone, rounds)
        if not self._redrawn:
            return positions, {n: state[f"{n}.values"] for n in self._before}
        self.load(state)
        values = {}
        for name, module in self.backbone.targets.items():
            weight = module.weight.detach().reshape(-1).float().cpu()
            values[name] = weight[torch.from_numpy(positions[name])]
        return positions, values

    def fingerprint(self) -> str:
        """Digest the masks, so that nodes with other masks are told apart."""
        return self._fingerprint

    def _draw(self, backbone: Backbone, number: int) -> dict[str, NDArray[np.int64]]:
        """Draw the lines of each matrix's mask in a round."""
        shapes = {name: _shape(module) for name, module in backbone.targets.items()}
        densities = deal_densities(shapes, self._density, self._budget)
        structure = self._structure
        return {
            name: draw_lines(
                self._seed, name, shape, densities[name], structure, number
            )
            for name, shape in shapes.items()
        }

    def mask_of(self, backbone: Backbone, number: int) -> dict[str, NDArray[np.int64]]:
        """Draw the mask of each target matrix in a round: row-major positions."""
        return {
            name: positions(lines, _shape(backbone.targets[name]), self._structure)
            for name, lines in self._draw(backbone, number).items()
        }

    def make(self, backbone: Backbone) -> dict[str, nn.Parameter]:
        """Make the target matrices compute with values of their own under a mask."""
        trained = {}
        masks = {}
        for name, drawn in self._draw(backbone, self._number).items():
            module = backbone.targets[name]
            masks[name] = positions(drawn, _shape(module), self._structure)
            self._lines[name] = lines = torch.from_numpy(drawn).to(module.weight.device)
            before = _gather(module.weight.detach(), lines, self._structure)
            self._before[name] = before.clone()
            values = nn.Parameter(before.to(torch.float32, copy=True))
            trained[f"{name}.values"] = values
            pattern = None
            if self._structure == "unstructured" and _is_sampled(lines, module):
                pattern = sparse_pattern(lines, _shape(module))
            mask = _Mask(lines, self._structure, pattern)
            module.forward = partial(_forward, module, values, mask)  # type: ignore[method-assign]
        self._fingerprint = fingerprint(masks)
        return trained

    def restore(self, backbone: Backbone) -> None:
        """Write the values back that were there before."""
        with torch.no_grad():
            for name, module in backbone.targets.items():
                before, lines = self._before[name], self._lines[name]
                _scatter(module.weight, lines, before, self._structure)
                del module.forward  # the class's own forward shows again
        self._lines, self._before = {}, {}


@dataclass(frozen=True)
class _Mask:
    """A mask on its device; `pattern` where its entries are sampled."""

    lines: Tensor
    structure: str
    pattern: Tensor | None


def sparse_pattern(positions: Tensor, shape: tuple[int, int]) -> Tensor:
    """Give a mask's sorted positions as a sparse CSR matrix of zeros."""
    rows, columns = positions // shape[1], positions % shape[1]
    starts = torch.bincount(rows, minlength=shape[0]).cumsum(0)
    starts = torch.cat([starts.new_zeros(1), starts])
    zeros = torch.zeros(len(positions), device=positions.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in")
        return torch.sparse_csr_tensor(
            starts, columns, zeros, shape, check_invariants=False
        )


def sampled_gradient(x: Tensor, grad_y: Tensor, pattern: Tensor) -> Tensor:
    """Compute the masked entries of grad_yᵀ x and no others.

    Parameters
    ----------
    x, grad_y : Tensor
        float32, shapes (tokens, in) and (tokens, out).
    pattern : Tensor
        The mask by `sparse_pattern`, k entries.

    Returns
    -------
    Tensor
        Shape (k,).
    """
    # `sampled_addmm` would make these copies itself, at half the speed.
    left, right = grad_y.T.contiguous(), x.T.contiguous().T
    return torch.sparse.sampled_addmm(pattern, left, right, beta=0.0).values()


def gathered_gradient(x: Tensor, grad_y: Tensor, positions: Tensor) -> Tensor:
    """Compute all of grad_yᵀ x, and take the entries at a mask's positions."""
    return (grad_y.T @ x).reshape(-1)[positions]


def _is_sampled(positions: Tensor, module: nn.Linear) -> bool:
    share = len(positions) / module.weight.numel()
    return positions.device.type == "cpu" and share <= SAMPLED_DENSITY


def _shape(module: nn.Linear) -> tuple[int, int]:
    return module.out_features, module.in_features


def _gather(matrix: Tensor, lines: Tensor, structure: str) -> Tensor:
    """Read a matrix at a mask, in the order of its positions."""
    if structure == "unstructured":
        return matrix.reshape(-1)[lines]
    return matrix.index_select(int(structure == "columns"), lines).reshape(-1)


def _scatter(weight: Tensor, lines: Tensor, values: Tensor, structure: str) -> None:
    """Write a weight at a mask."""
    if structure == "unstructured":
        weight.view(-1).index_copy_(0, lines, values)
    elif structure == "rows":
        weight.index_copy_(0, lines, values.view(-1, weight.shape[1]))
    else:
        weight.index_copy_(1, lines, values.view(weight.shape[0], -1))


def _forward(module: nn.Linear, values: Tensor, mask: _Mask, x: Tensor) -> Tensor:
    return _MaskedLinear.apply(x, values, module.weight, module.bias, mask)


class _MaskedLinear(torch.autograd.Function):
    """y = x Wᵀ + b, with a gradient for W's entries under the mask alone.

    An unstructured mask's entries are sampled: each is a product of two columns. Where
    matrix products are so much quicker that this does not pay, they are gathered from
    the dense gradient, which exists only inside one call of `backward`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: _Mask,
    ) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        columns = mask.structure == "columns"
        ctx.save_for_backward(x.index_select(-1, mask.lines) if columns else x)
        # `commit` changes the weight in place between steps, never between a forward
        # and its backward, so it needs no version check.
        ctx.weight, ctx.mask = weight, mask
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        mask: _Mask = ctx.mask
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ ctx.weight.to(grad_y.dtype)
        x, grad_y = x.flatten(0, -2), grad_y.flatten(0, -2)
        if mask.structure == "rows":
            grad_y = grad_y.index_select(1, mask.lines)
        if mask.structure != "unstructured":
            grad_values = (grad_y.T @ x).reshape(-1)
        elif mask.pattern is not None and x.dtype == grad_y.dtype == torch.float32:
            grad_values = sampled_gradient(x, grad_y, mask.pattern)
        else:
            grad_values = gathered_gradient(x, grad_y, mask.lines)
        return grad_x, grad_values.float(), None, None, None
