"""Adapters: what a client trains and sends, attached to a resident backbone."""

from slora_flwr.adapters.full import FullAdapter
from slora_flwr.adapters.head import HeadAdapter
from slora_flwr.adapters.low_rank import LowRankAdapter
from slora_flwr.adapters.sparse import SparseAdapter
from slora_flwr.config import RunConfig

__all__ = [
    "FullAdapter",
    "HeadAdapter",
    "LowRankAdapter",
    "SparseAdapter",
    "make_adapter",
]


def make_adapter(name: str, config: RunConfig) -> HeadAdapter:
    """Build the adapter of a phase, not yet attached.

    Parameters
    ----------
    name : str
        `full`, `head`, `sparse` or `lora`.
    config : RunConfig
        The run.
    """
    if name == "full":
        return FullAdapter()
    if name == "head":
        return HeadAdapter()
    if name == "sparse":
        return SparseAdapter(config.sparse.density, config.sparse.mask, config.seed)
    if name == "lora":
        return LowRankAdapter(config.lora.rank, config.lora.alpha)
    raise ValueError(f"adapter is {name!r}; allowed: full, head, sparse, lora")
