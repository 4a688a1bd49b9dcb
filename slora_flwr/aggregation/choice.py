"""The choice of a phase's aggregator, given privacy and robust statistics."""

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
        A phase of the schedule.
    config : RunConfig
        The run. Privacy or a robust statistic replaces the method's own aggregator.
    head : int
        Number of values at the end of a state that belong to the head.
    """
    if config.privacy.is_on:
        return ClippedAggregator(phase, config, head)
    if config.server.robust != "none":
        return RobustAggregator(phase, config, head)
    aggregator: Aggregator = phase.aggregator_type(phase, config, head)
    return aggregator
