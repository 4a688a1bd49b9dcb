"""Which aggregator a phase has, with privacy and robust statistics."""

from slora_flwr.aggregation.base import Aggregator
from slora_flwr.aggregation.clipped import ClippedAggregator
from slora_flwr.aggregation.robust import RobustAggregator
from slora_flwr.config import RunConfig
from slora_flwr.config.schedule import Phase


def make_aggregator(phase: Phase, config: RunConfig, head: int) -> Aggregator:
    """Return the aggregator of a phase, the same on a node and on the server.

    Parameters
    ----------
    phase : Phase
        One of the schedule's.
    config : RunConfig
        The run; privacy or a robust statistic takes the mean's place.
    head : int
        How many values at the end of a state are the head's.
    """
    if config.privacy.is_on:
        return ClippedAggregator(phase, config, head)
    if config.server.robust != "none":
        return RobustAggregator(phase, config, head)
    aggregator: Aggregator = phase.aggregator_type(phase, config, head)
    return aggregator
