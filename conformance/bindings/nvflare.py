"""NVIDIA FLARE: what its controller `FedAvg` aggregates by, `BaseFedAvg.aggregate_fn`.

It weights by a meta field that clients fill, the steps of the round; here, by examples.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["nvflare==2.9.0"]
#
# [tool.fedlora-conformance]
# package = "nvflare"
# source = "https://pypi.org/project/nvflare/"
# binds = "BaseFedAvg.aggregate_fn"
# ///

from nvflare.apis.fl_constant import FLMetaKey
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.workflows.base_fedavg import BaseFedAvg

from fedlora_conformance import Answer, Case, average
from fedlora_conformance.averaging import Arrays


def aggregate(case: Case) -> Answer:
    """Return NVIDIA FLARE's answer to a case."""
    return average(case, mean)


def mean(sent: Arrays, results: list[Arrays], examples: list[int]) -> Arrays:
    """Return the aggregate of a round's models."""
    models = [
        FLModel(params=result, meta={FLMetaKey.NUM_STEPS_CURRENT_ROUND: n})
        for result, n in zip(results, examples, strict=True)
    ]
    return BaseFedAvg.aggregate_fn(models).params
