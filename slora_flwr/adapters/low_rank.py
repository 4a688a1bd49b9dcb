"""Low-rank adaptation through PEFT's LoRA layers."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from slora_flwr.adapters.base import Adapter
from slora_flwr.adapters.low_rank_product import join_products
from slora_flwr.backbone.load import Backbone
from slora_flwr.common.tensors import State

if TYPE_CHECKING:
    # Checking a run config must not wait for PEFT's import, which takes seconds.
    from peft import LoraConfig


class LowRankAdapter(Adapter):
    """Train factors of each target matrix: W = W_base + s·B·A.

    The state holds `<module>.lora_A`, shape (rank, in), and `<module>.lora_B`, shape
    (out, rank). PEFT initialises A at random and B with zeros. LoRA: arXiv 2106.09685.

    If the base subtracts s·B_0·A_0, the layers compute s·[B, -B_0]·[A; A_0], as the
    export does: one product, in whose sums equal factors cancel.

    Parameters
    ----------
    rank : int
        Inner dimension r.
    alpha : float
        PEFT's `lora_alpha`.
    scaling : str
        s is alpha / r for `rank` and alpha / sqrt(r) for `root-rank` (rsLoRA, arXiv
        2312.03732).
    seed : int
        Seed of the random initialisation, the same on all machines.
    trains : str
        `both` factors; `b`: A is frozen and not part of the state (FFA-LoRA, arXiv
        2403.12313); `in-turn`: odd rounds train and return B, even rounds A (RoLoRA,
        arXiv 2409.02346).
    orthonormal : bool
        Initialise A with orthonormal rows.
    frozen : State or None
        Factors of the base, named as in the state: A_0 and B_0, or the frozen A alone
        if it does not follow from the seed.
    """

    is_low_rank = True

    def __init__(
        self,
        rank: int,
        alpha: float,
        *,
        scaling: str = "rank",
        seed: int = 0,
        trains: str = "both",
        orthonormal: bool = False,
        frozen: State | None = None,
    ) -> None:
        super().__init__()
        self.rank = rank
        self.scaling = alpha / (rank if scaling == "rank" else math.sqrt(rank))
        self._seed, self._trains = seed, trains
        self._orthonormal, self._frozen = orthonormal, frozen or {}
        self._factors: State = {}

    def peft_config(self, backbone: Backbone) -> "LoraConfig":
        """Return this adapter's PEFT config."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.scaling * self.rank,  # type: ignore[arg-type]
            target_modules=list(backbone.targets),
        )

    def begin(self, phase_round: int) -> None:
        """Freeze the factor that this round does not train."""
        if self._trains != "in-turn":
            return
        resting = ".lora_A" if phase_round % 2 else ".lora_B"
        self._idle = {name for name in self._trained if name.endswith(resting)}
        for name, parameter in self._trained.items():
            parameter.requires_grad_(name not in self._idle)

    def anchors(self) -> dict[str, Tensor]:
        """Return A_0 and B_0 if the base subtracts their product, else nothing.

        The trained thing is then s·(B·A - B_0·A_0), and decay towards 0 would take
        away what the factors started from.
        """
        if self._base is None or not self._base.b:
            return {}
        return self._base.factors()

    def whole(self, state: State) -> State:
        """Return a state completed by A, if A is frozen."""
        frozen = {f"{n}.lora_A": a.float().cpu() for n, a in self._factors.items()}
        return state | frozen

    def cut(self, state: State, rank: int) -> State:
        """Return the state for a client of a given rank, zero beyond that rank."""
        return cut_ranks(state, rank)

    def known(self) -> State:
        """Return an empty state: factors start at random."""
        return {}

    def fingerprint(self) -> str:
        """Return a digest of the layout, and of A if it is frozen."""
        digest = hashlib.blake2b(super().fingerprint().encode(), digest_size=16)
        for a in self._factors.values():
            digest.update(a.float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def change_shapes(self, backbone: Backbone, values: int) -> dict[str, torch.Size]:
        """Return the layout of a base change: b, (out, rank), and a, (rank, in)."""
        modules = backbone.targets
        rank = values // sum(m.out_features + m.in_features for m in modules.values())
        shapes = {}
        for name, module in modules.items():
            shapes[f"{name}.b"] = torch.Size([module.out_features, rank])
            shapes[f"{name}.a"] = torch.Size([rank, module.in_features])
        return shapes

    def change(self, backbone: Backbone, change: State, phase_round: int) -> None:
        """Add b·a to each target matrix."""
        with torch.no_grad():
            for name, module in backbone.targets.items():
                # In float64, so that the last bit rarely depends on the machine.
                product = change[f"{name}.b"].double() @ change[f"{name}.a"].double()
                module.weight.add_(product.to(module.weight.device, torch.float32))

    def make(self, backbone: Backbone) -> dict[str, nn.Parameter]:
        """Insert PEFT's layers, and return the trained factors."""
        from slora_flwr.adapters.peft_layers import wrap_peft

        frozen: tuple[Tensor, ...]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            self._model = wrap_peft(backbone.model, self.peft_config(backbone))
            trained = {}
            for name in backbone.targets:
                layer = backbone.model.get_submodule(name)
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                first_a = self._frozen.get(f"{name}.lora_A")
                first_b = self._frozen.get(f"{name}.lora_B")
                if self._orthonormal:
                    nn.init.orthogonal_(a)
                if self._trains == "b":
                    if first_a is not None:
                        a.data.copy_(first_a)
                    a.requires_grad_(False)
                    self._factors[name] = a.data
                else:
                    trained[f"{name}.lora_A"] = a
                trained[f"{name}.lora_B"] = b
                frozen = ()
                if first_a is not None and first_b is not None:
                    frozen = (first_a.to(a), -first_b.to(b))
                    _extend(layer.lora_A["default"], frozen[0], dim=0)
                    _extend(layer.lora_B["default"], frozen[1], dim=1)
                join_products(layer, *frozen)
        return trained

    def restore(self, backbone: Backbone) -> None:
        """Remove PEFT's layers."""
        self._model.unload()
        self._factors = {}
        del self._model


def _extend(linear: nn.Linear, frozen: Tensor, dim: int) -> None:
    """Have a layer compute with more rows or columns than those that it trains."""
    linear.forward = partial(_forward, linear.weight, frozen, dim)  # type: ignore[method-assign]


def _forward(weight: Tensor, frozen: Tensor, dim: int, x: Tensor) -> Tensor:
    return F.linear(x, torch.cat([weight, frozen], dim))


def cut_ranks(state: State, rank: int) -> State:
    """Return a state whose factors keep their first slices; the others become zero.

    A slice that is zero in both A and B has no gradient in either, so a client trains
    as if its factors had the smaller rank.
    """
    shapes = {name: tensor.shape for name, tensor in state.items()}
    return fill_slices(take_slices(state, rank), shapes)


def rank_shapes(
    shapes: Mapping[str, Sequence[int]], rank: int
) -> dict[str, tuple[int, ...]]:
    """Return a layout in which the factors have only their first slices."""
    cut = {name: tuple(shape) for name, shape in shapes.items()}
    for name, shape in cut.items():
        if name.endswith(".lora_A"):
            cut[name] = (rank, shape[1])
        elif name.endswith(".lora_B"):
            cut[name] = (shape[0], rank)
    return cut


def take_slices(state: Mapping[str, Tensor], rank: int) -> State:
    """Return a state in which the factors have only their first slices."""
    shapes = rank_shapes({name: t.shape for name, t in state.items()}, rank)
    return {n: t[tuple(map(slice, shapes[n]))] for n, t in state.items()}


def fill_slices(
    state: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
) -> State:
    """Return a state in which zeros stand for slices that were not sent."""
    filled = {}
    for name, tensor in state.items():
        filled[name] = tensor
        if tensor.shape != torch.Size(shapes[name]):
            filled[name] = tensor.new_zeros(tuple(shapes[name]))
            filled[name][tuple(map(slice, tensor.shape))] = tensor
    return filled
