"""FedIT's code by its formula: adapters weighted by the clients' numbers of examples.

The repository is no package; `FedAvg` in `fed_utils/model_aggregation.py` normalises
the clients' data set lengths to sum 1, adds up the adapters' tensors by these weights,
and loads the sum into the model.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy"]
#
# [tool.fedlora-conformance]
# name = "FederatedGPT-Shepherd"
# source = "https://github.com/JayZhang42/FederatedGPT-Shepherd/blob/90d8aa612852f637dc1ef300f549c8c2dc67c700/fed_utils/model_aggregation.py"
# binds = "FedAvg"
# ///

import numpy as np

from fedlora_conformance import Answer, Case, average
from fedlora_conformance.averaging import Arrays


def aggregate(case: Case) -> Answer:
    """Return the formula's answer to a `fedavg` case: both factors are trained."""
    if case["aggregator"] != "fedavg":
        raise NotImplementedError
    return average(case, mean)


def mean(sent: Arrays, results: list[Arrays], examples: list[int]) -> Arrays:
    """Return Σ w_i·x_i of each tensor, w_i = n_i / Σ n."""
    weights = np.array(examples, np.float32) / np.float32(sum(examples))
    pairs = list(zip(results, weights, strict=True))
    return {name: sum(w * r[name] for r, w in pairs) for name in sent}
