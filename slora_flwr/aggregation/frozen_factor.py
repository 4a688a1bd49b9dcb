"""Averages of one LoRA factor while all clients share the other."""

from slora_flwr.aggregation.base import Aggregator


class FrozenFactor(Aggregator):
    """Average B while A stays frozen (FFA-LoRA, arXiv 2403.12313)."""

    trains = "b"
    is_mean = True
    needs_factors = True


class AlternatingFactors(Aggregator):
    """Average B in odd rounds and A in even ones (RoLoRA, arXiv 2409.02346)."""

    trains = "in-turn"
    is_mean = True
    needs_factors = True
