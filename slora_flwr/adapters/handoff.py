"""The handoff of SLoRA: a finished sparse phase becomes a low-rank phase's start."""

from dataclasses import dataclass

import numpy as np
import torch

from slora_flwr.adapters.head import State
from slora_flwr.adapters.low_rank import LowRankAdapter
from slora_flwr.adapters.priming import (
    TruncatedSvd,
    check_handoff,
    prime,
    truncated_svd,
)
from slora_flwr.adapters.sparse import SparseAdapter
from slora_flwr.config import LoraConfig
from slora_flwr.models.backbone import Backbone
from slora_flwr.models.base_patch import BasePatch


@dataclass
class Handoff:
    """Where the low-rank phase starts.

    Attributes
    ----------
    state : State
        Of the low-rank adapter, with the head that the sparse phase trained.
    patch : BasePatch or None
        The base; None for W_0.
    energies : dict[str, float]
        Share of each delta's squared norm that the rank keeps, by target matrix.
    """

    state: State
    patch: BasePatch | None
    energies: dict[str, float]


def hand_over(
    backbone: Backbone, sparse: SparseAdapter, state: State, config: LoraConfig
) -> Handoff:
    """Prime the low-rank phase by the SVD of what the sparse phase learned.

    Parameters
    ----------
    backbone : Backbone
        With W_0 resident and `sparse` attached; on return nothing is attached.
    sparse : SparseAdapter
        The sparse phase's adapter.
    state : State
        Its final state.
    config : LoraConfig
        Rank, alpha, base and factors.

    Raises
    ------
    HandoffError
        If the effective weights are not what the base intends.
    """
    positions = sparse.masks(backbone)
    delta = sparse.delta(state)
    sparse.detach()
    lora = LowRankAdapter(config.rank, config.alpha)
    lora.attach(backbone)
    start = lora.state()  # PEFT's own start, for `warm-start`
    lora.detach()
    start |= {name: state[name] for name in backbone.head}

    a: State = {}
    b: State = {}
    energies: dict[str, float] = {}
    svds: dict[str, TruncatedSvd] = {}
    for name, module in backbone.targets.items():
        shape = (module.out_features, module.in_features)
        values = delta[name].numpy().astype(np.float64)
        svds[name] = svd = truncated_svd(positions[name], values, shape, config.rank)
        energies[name] = svd.energy
        if config.base != "warm-start":
            a[name], b[name] = prime(svd, lora.scaling, config.factors)
            start[f"{name}.lora_A"], start[f"{name}.lora_B"] = a[name], b[name]

    patch = None
    if config.base != "w0":
        values_by_name = {name: state[f"{name}.values"] for name in backbone.targets}
        patch = BasePatch(positions, values_by_name, a, b, lora.scaling)
    _check(backbone, lora.scaling, config.base, positions, delta, svds, start, patch)
    return Handoff(start, patch, energies)


def _check(
    backbone: Backbone,
    scaling: float,
    base: str,
    positions: dict[str, np.ndarray],
    delta: State,
    svds: dict[str, TruncatedSvd],
    start: State,
    patch: BasePatch | None,
) -> None:
    """Compare the weights that a node would compute with, one matrix at a time."""
    before = {n: m.weight.detach().float().cpu() for n, m in backbone.targets.items()}
    before = {name: weight.clone() for name, weight in before.items()}
    if patch is not None:
        patch.apply(backbone)
    for name, module in backbone.targets.items():
        b = start[f"{name}.lora_B"]
        product = scaling * (b @ start[f"{name}.lora_A"])
        effective = module.weight.detach().float().cpu() - before[name] + product
        if base != "warm-start":
            # The base of `residual` takes back whatever the factors are, so wrong ones
            # show only here.
            svd = svds[name]
            kept = torch.from_numpy((svd.u * svd.s) @ svd.vt).float()
            check_handoff(product, kept, b, base, name)
        if base != "w0":
            intended = torch.zeros(effective.numel())
            intended[torch.from_numpy(positions[name])] = delta[name]
            intended = intended.view_as(effective)
            weight = module.weight.detach()
            largest = max(float(before[name].abs().max()), float(weight.abs().max()))
            rounding = 2 * torch.finfo(weight.dtype).eps * largest
            check_handoff(effective, intended, b, base, name, rounding)
    if patch is not None:
        patch.remove(backbone)
