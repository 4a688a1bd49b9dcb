"""FedLab: `Aggregators.fedavg_aggregate` on serialised models, weighted by examples."""

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy"]
#
# [tool.fedlora-conformance]
# package = "fedlab"
# source = "https://pypi.org/project/fedlab/"
# binds = "Aggregators.fedavg_aggregate"
# without-dependencies = ["fedlab==1.3.0"]
# ///

import numpy as np
import torch
from fedlab.utils.aggregator import Aggregators

from fedlora_conformance import Answer, Case, average
from fedlora_conformance.averaging import Arrays


def aggregate(case: Case) -> Answer:
    """Return FedLab's answer to a case."""
    return average(case, mean)


def mean(sent: Arrays, results: list[Arrays], examples: list[int]) -> Arrays:
    """Return the mean of a round's models, each serialised to one vector."""
    serialized = [
        torch.cat([torch.from_numpy(result[name]).flatten() for name in sent])
        for result in results
    ]
    vector = Aggregators.fedavg_aggregate(serialized, examples).numpy()
    ends = np.cumsum([value.size for value in sent.values()])
    pieces = np.split(vector, ends[:-1])
    named = zip(sent.items(), pieces, strict=True)
    return {name: piece.reshape(value.shape) for (name, value), piece in named}
