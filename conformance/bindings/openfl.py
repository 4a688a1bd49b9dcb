"""OpenFL: `WeightedAverage`, its default; the server passes shares of all examples."""

# /// script
# requires-python = ">=3.11"
# dependencies = ["openfl==1.9"]
#
# [tool.fedlora-conformance]
# package = "openfl"
# source = "https://pypi.org/project/openfl/"
# binds = "WeightedAverage"
# ///

from openfl.interface.aggregation_functions import WeightedAverage
from openfl.utilities.types import LocalTensor

from fedlora_conformance import Answer, Case, average
from fedlora_conformance.averaging import Arrays


def aggregate(case: Case) -> Answer:
    """Return OpenFL's answer to a case."""
    return average(case, mean)


def mean(sent: Arrays, results: list[Arrays], examples: list[int]) -> Arrays:
    """Return the average of each tensor of a round's models."""
    function, total = WeightedAverage(), sum(examples)
    shares = [n / total for n in examples]

    def local(name: str) -> list[LocalTensor]:
        pairs = enumerate(zip(results, shares, strict=True))
        return [LocalTensor(str(i), r[name], share) for i, (r, share) in pairs]

    return {name: function.call(local(name)) for name in sent}
