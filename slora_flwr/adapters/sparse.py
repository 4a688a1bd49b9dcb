"""Sparse fine-tuning: training the masked entries of the target matrices in place.

Stage 1 of SLoRA (arXiv 2308.06522): one random mask of uniform density, derived from a
seed and shared by all clients.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from slora_flwr.adapters.base import (
    Adapter,
    require_float32,
    require_plain,
    require_targets,
)
from slora_flwr.adapters.masks import (
    allocate_densities,
    draw_lines,
    fingerprint,
    mask_size,
    positions,
    undrawn_lines,
    undrawn_positions,
)
from slora_flwr.adapters.per_example import Use
from slora_flwr.backbone.load import Backbone
from slora_flwr.backbone.quantised import is_quantised, weight_of
from slora_flwr.backbone.remade import keep_as_it_is, keep_input
from slora_flwr.backbone.sparse_term import (
    SAMPLED_DENSITY,
    SparseTerm,
    is_sampled,
    sparse_pattern,
)
from slora_flwr.common.tensors import State
from slora_flwr.config import RunConfig, refuse
from slora_flwr.config.schedule import Phase


class SparseAdapter(Adapter):
    """Train the values at a mask's positions.

    The state holds, for each target matrix, the weight's values at the mask's positions
    (`<module>.values`, shape (k,)), not their difference from W_0: writing them into
    the weight then loses no bits. While attached, each target module computes with its
    own resident weight, of which `commit` updates k entries; beside a packed weight
    they are a `SparseTerm`. The optimiser sees only these k values: it keeps no moments
    for the others and does not decay them. Weight decay pulls values towards W_0, since
    the trained thing is the difference from W_0 (so does the regulariser of sparse
    fine-tuning, arXiv 2110.07560).

    Parameters
    ----------
    density : float
        Share of the entries of the target matrices that the mask covers.
    structure : str
        Structure of the mask, see `masks.draw_lines`. For `rows` and `columns`, only
        their slice of the weight's gradient is computed; for `columns`, also only
        their slice of the activations is kept.
    seed : int
        The seed of the mask.
    budget : str
        How the density is allocated to the matrices, see `masks.allocate_densities`.
    redrawn : bool
        True if each round has its own mask. The base then takes on what each round
        trained, so a round's start values need not be sent: the base holds them.
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
        self._number = 0  # the mask's round, 0 for a fixed mask
        self._lines: dict[str, Tensor] = {}
        self._fingerprint = ""
        self._before: dict[str, Tensor] = {}
        self._terms: dict[str, SparseTerm] = {}
        self._masks: dict[str, _Mask] = {}

    @classmethod
    def from_config(
        cls, config: RunConfig, trains: str = "both", frozen: State | None = None
    ) -> Self:
        """Return a detached adapter, built from a run config."""
        sparse, redrawn = config.sparse, cls.changes_base(config)
        return cls(sparse.density, sparse.mask, config.seed, sparse.budget, redrawn)

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Raise ConfigError for settings that per-round masks rule out."""
        if not cls.changes_base(config):
            return
        writes = ", since sparse.schedule per-round writes to the weights"
        require_float32(config, writes)
        require_plain(config, writes)
        if config.server.optimizer != "none":
            # Moments gathered for one round's weights would move the next round's.
            allowed = "none, since sparse.schedule is per-round"
            raise refuse("server.optimizer", config.server.optimizer, allowed)

    @classmethod
    def check_fit(cls, config: RunConfig, backbone: Backbone) -> None:
        """Raise ConfigError if the backbone has no target matrices."""
        require_targets(config, backbone)

    @classmethod
    def changes_base(cls, config: RunConfig) -> bool:
        """Return whether each round has its own mask."""
        return config.sparse.schedule == "per-round"

    @classmethod
    def state_size(cls, config: RunConfig, backbone: Backbone) -> int:
        """Return the number of values in a complete state."""
        sparse = config.sparse
        shapes = {name: _shape(module) for name, module in backbone.targets.items()}
        densities = allocate_densities(shapes, sparse.density, sparse.budget)
        return backbone.head_size + sum(
            mask_size(shape, densities[name], sparse.mask)
            for name, shape in shapes.items()
        )

    @classmethod
    def kept_bytes(cls, config: RunConfig, backbone: Backbone) -> int:
        """Return the bytes of the mask, and of what restores the values at it."""
        sparse, kept = config.sparse, 4 * backbone.head_size
        shapes = {name: _shape(module) for name, module in backbone.targets.items()}
        densities = allocate_densities(shapes, sparse.density, sparse.budget)
        for name, shape in shapes.items():
            density, weight = densities[name], backbone.targets[name].weight
            size = mask_size(shape, density, sparse.mask)
            lines = len(undrawn_lines(shape, density, sparse.mask))
            kept += 8 * lines
            # Packed weights are compared with in float32.
            kept += size * (4 if backbone.quantize else weight.element_size())
            is_single = sparse.mask == "unstructured"
            if backbone.quantize and not is_single:
                kept += 8 * size  # the positions, which are not the lines
            if (is_single or backbone.quantize) and density <= SAMPLED_DENSITY:
                kept += 12 * size + 8 * (shape[0] + 1)  # the pattern on a CPU
        return kept

    @classmethod
    def traffic(
        cls,
        phase: Phase,
        config: RunConfig,
        backbone: Backbone,
        phase_round: int,
        client: int,
    ) -> tuple[int, int]:
        """Return how many values a client receives and returns in a round.

        Values that the base already holds are not sent.
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
        """Return the row-major positions of each target matrix's mask.

        Parameters
        ----------
        backbone : Backbone
            The backbone with the target matrices.
        rounds : int
            If masks are redrawn, return the union over this many first rounds.

        Returns
        -------
        dict
            For an outline, as many positions, all of them 0.
        """
        if backbone.outline is not None:
            shapes = {name: _shape(module) for name, module in backbone.targets.items()}
            densities = allocate_densities(shapes, self._density, self._budget)
            drawn = rounds if self._redrawn else 1
            return {
                name: undrawn_positions(shape, densities[name], self._structure, drawn)
                for name, shape in shapes.items()
            }
        numbers = range(1, rounds + 1) if self._redrawn else (0,)
        masks = [self.mask_of(backbone, number) for number in numbers]
        if len(masks) == 1:
            return masks[0]
        return {
            name: np.unique(np.concatenate([mask[name] for mask in masks]))
            for name in backbone.targets
        }

    def begin(self, phase_round: int) -> None:
        """Draw the round's mask, if each round has its own."""
        if self._redrawn and phase_round != self._number:
            self.restore(self.backbone)
            self._number = phase_round
            self._trained |= self.make(self.backbone)

    def uses(self) -> list[Use]:
        """Return the uses of the masked values and of the head."""
        return super().uses() + [
            Use(self._trained[f"{name}.values"], self.backbone.targets[name], mask.rows)
            for name, mask in self._masks.items()
        ]

    def anchors(self) -> dict[str, Tensor]:
        """Return W_0's values at the mask."""
        # Earlier rounds' masks have changed the weights that this round started from.
        first = self._base.before if self._base is not None and self._redrawn else {}
        return {
            f"{name}.values": _gather(first[name], lines, self._structure)
            if name in first
            else self._before[name]
            for name, lines in self._lines.items()
        }

    def sent(self) -> dict[str, torch.Size]:
        """Return the layout without the values that the base already holds."""
        shapes = self.shapes()
        if not self._redrawn:
            return shapes
        return {name: s for name, s in shapes.items() if not name.endswith(".values")}

    def complete(self, sent: State) -> State:
        """Return the complete state, with the values that the base holds."""
        if not self._redrawn:
            return sent
        values = {f"{name}.values": t.float().cpu() for name, t in self._before.items()}
        return values | sent

    def change_shapes(self, backbone: Backbone, rank: int) -> dict[str, torch.Size]:
        """Return the layout of a base change: the values at a round's mask."""
        shapes = self.mask_of(backbone, 1)
        return {f"{name}.values": torch.Size([len(p)]) for name, p in shapes.items()}

    def change(self, backbone: Backbone, change: State, phase_round: int) -> None:
        """Write a round's final values into the base; the adapter must be detached."""
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
                if name in self._terms:  # which reads the values themselves
                    continue
                weight = self.backbone.targets[name].weight
                values = self._trained[f"{name}.values"].to(weight.dtype)
                _scatter(weight, lines, values, self._structure)

    def learned(
        self, state: State, rounds: int
    ) -> tuple[dict[str, NDArray[np.int64]], State]:
        """Return the entries that the phase has trained; see `Adapter.learned`."""
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
        """Return a digest of the masks, by which server and nodes compare theirs."""
        return self._fingerprint

    def _draw(self, backbone: Backbone, number: int) -> dict[str, NDArray[np.int64]]:
        """Draw the entries, rows or columns of each matrix's mask in a round."""
        shapes = {name: _shape(module) for name, module in backbone.targets.items()}
        densities = allocate_densities(shapes, self._density, self._budget)
        structure = self._structure
        if backbone.outline is not None:
            return {
                name: undrawn_lines(shape, densities[name], structure)
                for name, shape in shapes.items()
            }
        return {
            name: draw_lines(
                self._seed, name, shape, densities[name], structure, number
            )
            for name, shape in shapes.items()
        }

    def mask_of(self, backbone: Backbone, number: int) -> dict[str, NDArray[np.int64]]:
        """Return the row-major positions of each target matrix's mask in a round."""
        return {
            name: positions(lines, _shape(backbone.targets[name]), self._structure)
            for name, lines in self._draw(backbone, number).items()
        }

    def make(self, backbone: Backbone) -> dict[str, nn.Parameter]:
        """Replace the target matrices' forward passes, and return the masked values."""
        trained = {}
        masks = {}
        is_drawn = backbone.outline is None
        for name, drawn in self._draw(backbone, self._number).items():
            module = backbone.targets[name]
            if is_drawn:
                masks[name] = positions(drawn, _shape(module), self._structure)
            self._lines[name] = lines = torch.from_numpy(drawn).to(module.weight.device)
            before = _gather(weight_of(module), lines, self._structure)
            self._before[name] = before.clone()
            values = nn.Parameter(before.to(torch.float32, copy=True))
            trained[f"{name}.values"] = values
            pattern = None
            is_single = self._structure == "unstructured"
            if is_drawn and is_single and is_sampled(lines, _shape(module)):
                pattern = sparse_pattern(lines, _shape(module))
            self._masks[name] = mask = _Mask(lines, self._structure, pattern)
            if is_quantised(module):
                term = SparseTerm(module, masks[name], values, mask, pattern)
                self._terms[name], self._before[name] = term, term.before
                continue
            module.forward = partial(_forward, module, values, mask)  # type: ignore[method-assign]
        self._fingerprint = fingerprint(masks)
        return trained

    def restore(self, backbone: Backbone) -> None:
        """Restore the masked values and the forward passes."""
        with torch.no_grad():
            for name, module in backbone.targets.items():
                if name in self._terms:
                    self._terms.pop(name).remove()
                    continue
                before, lines = self._before[name], self._lines[name]
                _scatter(module.weight, lines, before, self._structure)
                del module.forward  # uncovers the class's own forward
        self._lines, self._before, self._masks = {}, {}, {}


@dataclass(frozen=True)
class _Mask:
    """A mask on its device, with a `pattern` if its gradient is sampled."""

    lines: Tensor
    structure: str
    pattern: Tensor | None

    def keep(self, x: Tensor) -> Tensor:
        """Return the features of a layer's input that the gradient needs."""
        return x.index_select(-1, self.lines) if self.structure == "columns" else x

    def gradient(self, kept: Tensor, grad_y: Tensor) -> Tensor:
        """Compute the masked entries of grad_yᵀ x, (k,), float32.

        Parameters
        ----------
        kept : Tensor
            What `keep` returned, (tokens, in).
        grad_y : Tensor
            Gradient of the layer's output, (tokens, out).
        """
        if self.structure == "rows":
            grad_y = grad_y.index_select(1, self.lines)
        if self.structure != "unstructured":
            return (grad_y.T @ kept).reshape(-1).float()
        if self.pattern is not None:
            return sampled_gradient(kept.float(), grad_y.float(), self.pattern)
        return gathered_gradient(kept, grad_y, self.lines).float()

    def rows(self, x: Tensor, grad_y: Tensor) -> Tensor:
        """Compute what `gradient` does for each row of a batch, (rows, k)."""
        pairs = zip(self.keep(x), grad_y, strict=True)
        return torch.stack([self.gradient(kept, given) for kept, given in pairs])


def sampled_gradient(x: Tensor, grad_y: Tensor, pattern: Tensor) -> Tensor:
    """Compute only the masked entries of grad_yᵀ x.

    Parameters
    ----------
    x, grad_y : Tensor
        float32, shapes (tokens, in) and (tokens, out).
    pattern : Tensor
        The mask as returned by `sparse_pattern`, k entries.

    Returns
    -------
    Tensor
        Shape (k,).
    """
    # `sampled_addmm` would make these copies itself, at half the speed.
    left, right = grad_y.T.contiguous(), x.T.contiguous().T
    return torch.sparse.sampled_addmm(pattern, left, right, beta=0.0).values()


def gathered_gradient(x: Tensor, grad_y: Tensor, positions: Tensor) -> Tensor:
    """Compute all of grad_yᵀ x and return the entries at a mask's positions."""
    return (grad_y.T @ x).reshape(-1)[positions]


def _shape(module: nn.Linear) -> tuple[int, int]:
    return module.out_features, module.in_features


def _gather(matrix: Tensor, lines: Tensor, structure: str) -> Tensor:
    """Return a matrix's entries at a mask, in the order of its positions."""
    if structure == "unstructured":
        return matrix.reshape(-1)[lines]
    return matrix.index_select(int(structure == "columns"), lines).reshape(-1)


def _scatter(weight: Tensor, lines: Tensor, values: Tensor, structure: str) -> None:
    """Write values into a weight at a mask."""
    if structure == "unstructured":
        weight.view(-1).index_copy_(0, lines, values)
    elif structure == "rows":
        weight.index_copy_(0, lines, values.view(-1, weight.shape[1]))
    else:
        weight.index_copy_(1, lines, values.view(weight.shape[0], -1))


def _forward(module: nn.Linear, values: Tensor, mask: _Mask, x: Tensor) -> Tensor:
    return _MaskedLinear.apply(x, values, module.weight, module.bias, mask)


class _MaskedLinear(torch.autograd.Function):
    """y = x Wᵀ + b, with a gradient only for the masked entries of W.

    The gradient of an unstructured mask is sampled: each entry is a product of two
    columns. Where the dense product is faster, the entries are gathered from the dense
    gradient, which exists only inside one call of `backward`.
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
        given = x
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        kept, ctx.make = mask.keep(x), keep_as_it_is
        if kept is x:  # and no slice, smaller than what x is made from
            kept, ctx.make = keep_input(given, x)
        ctx.save_for_backward(kept)
        # `commit` changes the weight in place between steps, never between a forward
        # and its backward, so the weight needs no version check.
        ctx.weight, ctx.mask = weight, mask
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        x = ctx.make(kept)
        mask: _Mask = ctx.mask
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ ctx.weight.to(grad_y.dtype)
        grad_values = mask.gradient(x.flatten(0, -2), grad_y.flatten(0, -2))
        return grad_x, grad_values, None, None, None
