"""The bound on an update's L2 norm, `server.clip-norm`."""

import math
from collections.abc import Mapping

from torch import Tensor

from slora_flwr.common.tensors import State
from slora_flwr.wire.quantize import BLOCK

# By which share of its norm decoding can lengthen a vector, at most. Each value of a
# block changes by at most one step, a 127th or a 7th of the block's largest.
_ROUNDING = {
    "float32": 0.0,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
    "int8": math.sqrt(BLOCK) / 127,
    "int4": math.sqrt(BLOCK) / 7,
}
# Below 2^-14 float16's steps no longer depend on the value.
_FLOAT16_STEP = 2.0**-24
# Allowance for rounding in the arithmetic itself.
_SLACK = 1e-4


def norm(update: Mapping[str, Tensor]) -> float:
    """Compute the L2 norm of a flattened update."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in update.values()))


def clip(update: State, bound: float) -> State:
    """Return an update scaled down to the bound if it is longer; 0 for no bound."""
    length = norm(update) if bound else 0.0
    if length <= bound:
        return update
    return {name: tensor * (bound / length) for name, tensor in update.items()}


def largest_norm(bound: float, dtype: str, count: int) -> float:
    """Return the largest norm of an update that was clipped, encoded and decoded.

    Parameters
    ----------
    bound : float
        The norm to which it was clipped.
    dtype : str
        Type of the encoded values, see `slora_flwr.wire.quantize`.
    count : int
        Number of values.
    """
    steps = _FLOAT16_STEP * math.sqrt(count) if dtype == "float16" else 0.0
    return bound * (1 + _ROUNDING[dtype] + _SLACK) + steps
