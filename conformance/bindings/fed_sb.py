"""The code that APPFL's `FedSBAggregator` imports, by its formulas: equal shares.

The repository is no package on PyPI. In its `fed_agg.py`, `aggregate_models_fed_it`
averages A, B and the classifier; `aggregate_models_ffa`, B and the classifier;
`aggregate_models_fedex` averages as the first and adds alpha / r times
1/k·Σ B_i·A_i - B'·A' to the base weight. Each of k clients counts once. The scaling by
alpha / sqrt(r) is not in it, so those cases of `exact` are not offered.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy"]
#
# [tool.fedlora-conformance]
# name = "fed-sb (a fork)"
# source = "https://github.com/putssander/fed-sb/blob/3515e04824d218a92b13f8758e5d92aa3efe3e95/fed_sb/fed/fed_agg.py"
# binds = "aggregate_models_fed_it, aggregate_models_ffa, aggregate_models_fedex"
# differs = """\
# Each client counts once, as in its papers' formulas, where clients hold equal shares \
# of the data; the suite weights by examples. With equal numbers of examples, all \
# cases pass."""
# ///

import numpy as np

from fedlora_conformance import Answer, Case, average
from fedlora_conformance.averaging import Arrays

RULE = "alpha / rank"


def aggregate(case: Case) -> Answer:
    """Return the formulas' answer to a case."""
    if case["aggregator"] in ("fedavg", "ffa"):
        return average(case, mean)
    if case["aggregator"] != "exact" or case["scaling"]["rule"] != RULE:
        raise NotImplementedError
    s = case["scaling"]["s"]
    base = {name: layer["W"] for name, layer in case["start"]["layers"].items()}
    answers = []
    for current in case["rounds"]:
        clients = current["clients"]
        effective = {}
        for name in base:
            layers = [client["layers"][name] for client in clients]
            a, b = (np.mean([layer[f] for layer in layers], 0) for f in "AB")
            product = np.mean([layer["B"] @ layer["A"] for layer in layers], 0)
            base[name] = base[name] + s * (product - b @ a)
            effective[name] = base[name] + s * b @ a
        head = np.mean([client["head"] for client in clients], 0)
        answers.append({"effective": effective, "head": head})
    return answers


def mean(sent: Arrays, results: list[Arrays], examples: list[int]) -> Arrays:
    """Return the plain mean of each tensor."""
    return {name: np.mean([result[name] for result in results], 0) for name in sent}
