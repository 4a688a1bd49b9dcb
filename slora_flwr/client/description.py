"""A node's description of itself: its version, its backbone, its clients' sizes."""

from collections import Counter

import numpy as np
from flwr.app import ConfigRecord, Context, MetricRecord, RecordDict

from slora_flwr.backbone.load import best_device, digest_of
from slora_flwr.client.membership import new_keys
from slora_flwr.client.permits import masked
from slora_flwr.client.process import get_process, read_config, read_source
from slora_flwr.common.protocol import installed_version
from slora_flwr.common.text import default_name
from slora_flwr.config import RunConfig
from slora_flwr.config.identity import code_identity
from slora_flwr.secure.identity import Identity
from slora_flwr.tasks.choice import find_task
from slora_flwr.training.precision import precision_on
from slora_flwr.wire.secure_messages import KEYS


def describe(
    context: Context, fewest: int = 0, identity: Identity | None = None
) -> RecordDict:
    """Return this node's answer to the server's query.

    Parameters
    ----------
    context : Context
        The node's context.
    fewest : int
        How many examples of its own data the node must have.
    identity : Identity or None
        The node's own key, which signs its keys of secure sums.
    """
    config = read_config(context)
    described = ConfigRecord({"version": installed_version(), **code_identity(config)})
    # Number of nodes in a simulation, for which the server waits.
    described["nodes"] = int(context.node_config.get("num-partitions", 1))
    if config.data.is_own:
        metrics = _add_own_data(config, context, described, fewest)
    else:
        metrics = _add_partition(config, context, described)
    described["precision"] = precision_on(config, best_device())
    if config.secure.aggregation:
        described[KEYS] = new_keys(context, identity)
    return RecordDict({"config": described, "metrics": metrics})


def node_name(context: Context) -> str:
    """Return the name that a node's operator gave it, or one of its number or id."""
    config = context.node_config
    number = config.get("partition-id", context.node_id)
    return str(config.get("name", default_name(number)))


def _add_partition(
    config: RunConfig, context: Context, described: ConfigRecord
) -> MetricRecord:
    trainer = get_process(context).trainer
    described["backbone"] = trainer.model.digest
    described["partition"] = trainer.data.partition_digest
    described["classes"] = trainer.data.classes_digest
    sizes = trainer.data.partition.sizes
    hosted = np.arange(len(sizes))
    if config.clients.count == 0:
        hosted = hosted[[int(context.node_config["partition-id"])]]
    return MetricRecord(
        {"clients": hosted.tolist(), "examples": sizes[hosted].tolist()}
    )


def _add_own_data(
    config: RunConfig, context: Context, described: ConfigRecord, fewest: int
) -> MetricRecord:
    """Add counts, label names if the task has any, and nothing else about the data.

    With privacy of examples it is their number alone.
    """
    source, task = read_source(context, config, fewest), find_task(config)
    is_private = config.privacy.of_examples
    skipped: dict[str, int] = {}
    if is_private:
        texts = source.of_labels(config.data.label_names)
    else:
        texts, skipped = source.usable()
    with masked():
        described["backbone"] = digest_of(config.model, task)
    described["name"] = node_name(context)
    counts = [len(texts.texts)]
    if task.has_classes and not is_private:
        labels = dict(sorted(Counter(texts.labels).items()))
        described["labels"], counts = list(labels), list(labels.values())
    if "partition-id" in context.node_config:
        described["client"] = int(context.node_config["partition-id"])
    metrics = MetricRecord({"examples": counts})
    if skipped:  # Flower cannot count the bytes of an empty list
        described["skipped"] = list(skipped)
        metrics["skipped"] = list(skipped.values())
    return metrics
