"""Adapters: what a client trains and sends, attached to a resident backbone."""

from slora_flwr.adapters.base import Adapter
from slora_flwr.adapters.bottleneck import HoulsbyAdapter, PfeifferAdapter
from slora_flwr.adapters.full import BiasAdapter, FullAdapter
from slora_flwr.adapters.head import HeadAdapter
from slora_flwr.adapters.lora import LoraAdapter
from slora_flwr.adapters.low_rank import LowRankAdapter
from slora_flwr.adapters.sparse import SparseAdapter
from slora_flwr.common.quiet import quiet_bitsandbytes

__all__ = [
    "Adapter",
    "BiasAdapter",
    "FullAdapter",
    "HeadAdapter",
    "HoulsbyAdapter",
    "LoraAdapter",
    "LowRankAdapter",
    "PfeifferAdapter",
    "SparseAdapter",
]

# PEFT, which this package alone imports, imports bitsandbytes where it is installed.
quiet_bitsandbytes()
