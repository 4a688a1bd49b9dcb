"""pfl: `WeightByDatapoints`, `SumAggregator` and the average of `FederatedAveraging`.

Users send updates; the server adds their mean, as central SGD with a rate of 1.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["pfl==0.6.0"]
#
# [tool.fedlora-conformance]
# package = "pfl"
# source = "https://pypi.org/project/pfl/"
# binds = "WeightByDatapoints, SumAggregator"
# ///

from pfl.aggregate.base import SumAggregator
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.context import UserContext
from pfl.stats import MappedVectorStatistics

from fedlora_conformance import Answer, Case, average
from fedlora_conformance.averaging import Arrays


def aggregate(case: Case) -> Answer:
    """Return pfl's answer to a case."""
    return average(case, mean)


def mean(sent: Arrays, results: list[Arrays], examples: list[int]) -> Arrays:
    """Return what was sent plus the average of a round's updates."""
    aggregator, weighting, total = SumAggregator(), WeightByDatapoints(), None
    for user, (result, n) in enumerate(zip(results, examples, strict=True)):
        update = MappedVectorStatistics({k: result[k] - sent[k] for k in sent})
        context = UserContext(num_datapoints=n, seed=0, user_id=str(user))
        weighted, _ = weighting.postprocess_one_user(stats=update, user_context=context)
        total = aggregator.accumulate(accumulated=total, user_stats=weighted)
    assert total is not None
    total.average()
    return {name: sent[name] + total[name] for name in sent}
