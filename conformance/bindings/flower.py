"""Flower: the strategy `FedAvg`, on replies with `num-examples`."""

# /// script
# requires-python = ">=3.11"
# dependencies = ["flwr==1.42.0"]
#
# [tool.fedlora-conformance]
# package = "flwr"
# source = "https://pypi.org/project/flwr/"
# binds = "strategy FedAvg"
# ///

import numpy as np
from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.serverapp.strategy import FedAvg

from fedlora_conformance import Answer, Case, average
from fedlora_conformance.averaging import Arrays


def aggregate(case: Case) -> Answer:
    """Return Flower's answer to a case."""
    return average(case, mean)


def mean(sent: Arrays, results: list[Arrays], examples: list[int]) -> Arrays:
    """Return the strategy's aggregate of a round's replies."""
    replies = [reply(*one) for one in zip(results, examples, strict=True)]
    arrays, _ = FedAvg().aggregate_train(1, replies)
    assert arrays is not None
    return {name: array.numpy() for name, array in arrays.items()}


def reply(result: Arrays, examples: int) -> Message:
    """Return a client's reply, as the server receives it."""
    arrays = {name: Array(np.ascontiguousarray(v)) for name, v in result.items()}
    metrics = MetricRecord({"num-examples": examples})
    content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
    return make_message(Metadata(1, "", 1, 0, "", "", 0.0, 1.0, "train"), content)
