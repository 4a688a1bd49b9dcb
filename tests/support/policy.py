"""Nodes that have a policy, and what is beside it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context

from slora_flwr.policy.audit import LOG
from tests.support.own_node import a_node
from tests.support.runs import Config

# Where there are no data: whatever opens them fails.
NOWHERE = "/nowhere/notes.csv"
KINDS = ("query", "train", "query.introduce", "query.tell", "evaluate")


def policed(folder: Path, policy: str, config: Config, **node_config: Any) -> Context:
    """Return the context of a node with a policy, whose data are nowhere."""
    path = folder / "policy.toml"
    path.write_text(policy)
    own = {"data_path": NOWHERE, "data_text": "text", "data_label": "label"}
    return a_node(config, policy=str(path), **(own | node_config))


def log_of(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of the log of a policy in a folder."""
    lines = (folder / "state" / LOG).read_text().splitlines()
    return [json.loads(line) for line in lines]


def by_hand(noise: float, steps: int, delta: float) -> float:
    """Return epsilon of Gaussian sums of all examples.

    By arXiv 1702.07476, corollary 3, and arXiv 2004.00010, proposition 12.
    """
    order = np.linspace(1.01, 200, 200_000)
    rdp = steps * order / (2 * noise**2)
    found = rdp + np.log1p(-1 / order) - (math.log(delta) + np.log(order)) / (order - 1)
    return float(found.min())
