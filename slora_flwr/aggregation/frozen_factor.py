"""Averages of one of LoRA's factors, the other of which all clients share."""

from slora_flwr.aggregation.base import Aggregator


class FrozenFactor(Aggregator):
    """A stays as it starts; B is averaged (FFA-LoRA, arXiv 2403.12313)."""

    trains = "b"


class AlternatingFactors(Aggregator):
    """Odd rounds average B, even ones A (RoLoRA, arXiv 2409.02346)."""

    trains = "in-turn"
