"""APPFL: `FedAvgAggregator` with `client_weights_mode: sample_size`."""

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy", "omegaconf", "opacus", "packaging", "scipy"]
#
# [tool.fedlora-conformance]
# package = "appfl"
# source = "https://pypi.org/project/appfl/"
# binds = "FedAvgAggregator"
# without-dependencies = ["appfl==1.12.0"]
# ///

import torch
from appfl.algorithm.aggregator import FedAvgAggregator
from omegaconf import DictConfig

from fedlora_conformance import Answer, Case, average
from fedlora_conformance.averaging import Arrays


def aggregate(case: Case) -> Answer:
    """Return APPFL's answer to a case, by one aggregator for all its rounds."""
    settings = DictConfig({"client_weights_mode": "sample_size"})
    aggregator = FedAvgAggregator(aggregator_configs=settings)

    def mean(sent: Arrays, results: list[Arrays], examples: list[int]) -> Arrays:
        models = {}
        for client, (result, n) in enumerate(zip(results, examples, strict=True)):
            aggregator.set_client_sample_size(client, n)
            models[client] = {k: torch.from_numpy(v) for k, v in result.items()}
        return {k: v.numpy() for k, v in aggregator.aggregate(models).items()}

    return average(case, mean)
