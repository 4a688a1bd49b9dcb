"""Adapters: what a client trains and sends, attached to a resident backbone."""

from slora_flwr.adapters.base import HeadAdapter
from slora_flwr.adapters.bias import BiasAdapter
from slora_flwr.adapters.bottleneck import KINDS, BottleneckAdapter
from slora_flwr.adapters.full import FullAdapter
from slora_flwr.adapters.low_rank import LowRankAdapter
from slora_flwr.adapters.sparse import SparseAdapter
from slora_flwr.common.tensors import State
from slora_flwr.config import RunConfig

__all__ = [
    "BiasAdapter",
    "BottleneckAdapter",
    "FullAdapter",
    "HeadAdapter",
    "LowRankAdapter",
    "SparseAdapter",
    "make_adapter",
]


def make_adapter(
    name: str, config: RunConfig, frozen: State | None = None
) -> HeadAdapter:
    """Build the adapter of a phase, not yet attached.

    Parameters
    ----------
    name : str
        `full`, `bias`, `head`, `sparse`, `lora`, `houlsby` or `pfeiffer`.
    config : RunConfig
        The run.
    frozen : State or None
        For `lora` with aggregator `ffa`: A, where the phase's base brings it.
    """
    if name == "full":
        return FullAdapter()
    if name == "bias":
        return BiasAdapter()
    if name in KINDS:
        return BottleneckAdapter(name, config.bottleneck.reduction)
    if name == "head":
        return HeadAdapter()
    if name == "sparse":
        sparse = config.sparse
        redrawn = sparse.schedule == "per-round"
        return SparseAdapter(
            sparse.density, sparse.mask, config.seed, sparse.budget, redrawn
        )
    if name == "lora":
        return LowRankAdapter(
            config.lora.rank,
            config.lora.alpha,
            scaling=config.lora.scaling,
            seed=config.seed,
            aggregator=config.aggregator,
            orthonormal=config.lora.start == "orthonormal",
            frozen=frozen,
        )
    raise ValueError(f"adapter is {name!r}, which no method has")
