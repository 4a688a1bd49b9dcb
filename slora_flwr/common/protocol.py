"""The protocol of this version of slora-flwr, and the version that is installed."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

PROTOCOL = 2
"""The number that server, nodes and checkpoints of a run have in common.

Raise it by 1 in every change that alters

- a message: its records, their keys and types, the bytes of a payload, or what a node
  is to make of them;
- a number that a run computes from the same config, be it in its last bits: a draw, an
  order of examples, a mask, a step of an optimiser, an aggregate, a default;
- what a checkpoint holds, where `runs.checkpoint.FORMAT` is not raised.

Comments, docs, logs, errors, events, reports and what is faster with the same bits do
not raise it. `tests/golden` notices most of what does.
"""


@cache  # It is told in each query and reply, and takes a millisecond.
def installed_version() -> str:
    """Return the version of slora-flwr that is installed, `unknown` if none is.

    Flower sends a run's code to all nodes, so what is installed may be another one.
    """
    try:
        return version("slora-flwr")
    except PackageNotFoundError:
        return "unknown"
