"""SLoRA's handoff: a finished sparse phase becomes the start of a low-rank phase."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slora_flwr.adapters.low_rank import LowRankAdapter
from slora_flwr.adapters.priming import check_equal, check_primed, prime
from slora_flwr.adapters.sparse import SparseAdapter
from slora_flwr.backbone.base_weights import BaseWeights, entries_of
from slora_flwr.backbone.load import Backbone
from slora_flwr.backbone.quantised import is_quantised, weight_of
from slora_flwr.common.svd import TruncatedSvd, truncated_svd
from slora_flwr.common.tensors import State
from slora_flwr.config import LoraConfig, RunConfig
from slora_flwr.config.schedule import Phase


@dataclass
class Handoff:
    """The start of a low-rank phase.

    Attributes
    ----------
    state : State
        State of the low-rank adapter, with the head that the sparse phase trained.
    base : BaseWeights or None
        The base; None for W_0.
    energies : dict[str, float]
        Share of each delta's squared norm that the rank keeps, by target matrix.
    continues : bool
        True if the low-rank phase starts from the sparse phase's function.
    """

    state: State
    base: BaseWeights | None
    energies: dict[str, float]
    continues: bool = True


def prime_low_rank(
    backbone: Backbone,
    positions: dict[str, NDArray[np.int64]],
    values: State,
    head: State,
    config: LoraConfig,
    trains: str = "both",
    seed: int = 0,
) -> Handoff:
    """Prime a low-rank phase by the SVD of what the sparse phase learned.

    Parameters
    ----------
    backbone : Backbone
        The backbone with W_0 and nothing attached, both before and after the call.
    positions : dict[str, NDArray[np.int64]]
        Row-major positions of the changed entries of each target matrix, (k,).
    values : State
        The weights at these positions, (k,).
    head : State
        The trained head.
    config : LoraConfig
        Rank, alpha, base and factors.
    trains : str
        Which factors clients train; see `LowRankAdapter`.
    seed : int
        Seed of LoRA's own initialisation, used for base `warm-start`.

    Raises
    ------
    HandoffError
        If the effective weights are not what the base intends.
    """
    lora = LowRankAdapter(
        config.rank,
        config.alpha,
        scaling=config.scaling,
        seed=seed,
        trains=trains,
    )
    lora.attach(backbone)
    start = lora.whole(lora.state()) | head  # PEFT's initialisation, for `warm-start`
    lora.detach()

    frozen = trains == "b"
    factors = _resolve(config, trains)
    a: State = {}
    b: State = {}
    energies = {}
    for name, module in backbone.targets.items():
        shape = (module.out_features, module.in_features)
        before = entries_of(module, positions[name])
        delta = (values[name] - before).double().numpy()
        svd = truncated_svd(positions[name], delta, shape, config.rank)
        energies[name] = svd.energy
        if config.base != "warm-start":
            a[name], b[name] = prime(svd, lora.scaling, factors)
            check_primed(a[name], b[name], lora.scaling, svd, config.base, name)
            start[f"{name}.lora_A"], start[f"{name}.lora_B"] = a[name], b[name]

    patch = None
    if config.base != "w0":
        patch = BaseWeights(positions, values, a, b, lora.scaling)
        _check(backbone, patch, start, config.base)
    elif frozen:
        patch = BaseWeights(a=a)
    if frozen:
        start = {n: t for n, t in start.items() if not n.endswith(".lora_A")}
    return Handoff(start, patch, energies, continues=config.base != "w0")


def _resolve(config: LoraConfig, trains: str) -> str:
    """Return `config.factors`, with `auto` resolved: a frozen A is orthonormal."""
    if config.factors != "auto":
        return config.factors
    return "b" if trains == "b" else "balanced"


def start_from_weights(
    backbone: Backbone, config: LoraConfig, trains: str = "both"
) -> tuple[State, BaseWeights]:
    """Compute the start of a low-rank phase from the SVD of W_0.

    FeDeRA (arXiv 2404.18848), PiSSA (arXiv 2404.02948): s·B·A = U_r S_r V_rᵀ of W_0
    over the base W_0 - s·B·A, so that the model computes what W_0 does.

    Parameters
    ----------
    backbone : Backbone
        The backbone with W_0 and nothing attached.
    config : LoraConfig
        Rank, alpha and factors.
    trains : str
        Which factors clients train; see `LowRankAdapter`.

    Returns
    -------
    state : State
        The factors, named as in the low-rank adapter's state.
    base : BaseWeights
        The base.
    """
    scaling = LowRankAdapter(config.rank, config.alpha, scaling=config.scaling).scaling
    frozen = trains == "b"
    factors = _resolve(config, trains)
    state: State = {}
    base = BaseWeights(scaling=scaling)
    for name, module in backbone.targets.items():
        weight = weight_of(module).double().cpu().numpy()
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
        rank = config.rank
        svd = TruncatedSvd(u[:, :rank], s[:rank], vt[:rank], energy=1.0)
        a, b = prime(svd, scaling, factors)
        base.a[name], base.b[name] = a, b
        if not frozen:
            state[f"{name}.lora_A"] = a
        state[f"{name}.lora_B"] = b
    return state, base


def base_layout(
    phase: Phase, config: RunConfig, backbone: Backbone, rounds_before: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, NDArray[np.int64]], float]:
    """Return the layout of a low-rank phase's base; see `Adapter.base_layout`."""
    lora, frozen = config.lora, phase.aggregator_type.trains == "b"
    positions: dict[str, NDArray[np.int64]] = {}
    start = lora.base if phase.primed else lora.start
    if start in ("residual", "warm-start"):
        positions = SparseAdapter.from_config(config).masks(backbone, rounds_before)
    alone = "a" if frozen else ""
    factors = {"residual": "ab", "federa": "ab", "w0": alone, "orthonormal": alone}
    shapes = BaseWeights.shapes(backbone, positions, lora.rank, factors.get(start, ""))
    scaling = LowRankAdapter(lora.rank, lora.alpha, scaling=lora.scaling).scaling
    return shapes, positions, scaling


def _check(backbone: Backbone, patch: BaseWeights, start: State, base: str) -> None:
    """Check what a node would compute with, exactly.

    The weights hold the sparse values, rounded to their type if they are not packed,
    and the factors that the base subtracts are those that the phase starts from. Its
    function is then that of the sparse phase.
    """
    frozen = patch.apply(backbone)
    try:
        for name, module in backbone.targets.items():
            stored = patch.values[name]
            if not is_quantised(module):
                stored = stored.to(module.weight.dtype).float()
            found = entries_of(module, patch.positions[name])
            check_equal(found, stored, base, name)
    finally:
        patch.remove(backbone)
    for name, factor in frozen.items():
        check_equal(factor, start[name], base, name)
