"""A state as one packed array, and back.

Flower moves one 20 MB array about five times as fast as the same bytes in hundreds of
arrays, so a message carries a state as one. Names and shapes do not travel: both sides
know them from the phase, and a fingerprint says whether they agree.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from flwr.app import Array
from torch import Tensor

STYPE = "slora.packed"


class PayloadError(ValueError):
    """A packed array that is not what it should be."""


def pack(state: Mapping[str, Tensor]) -> Array:
    """Pack tensors, in their order, as little-endian float32."""
    flat = [
        tensor.detach().to("cpu", torch.float32).reshape(-1)
        for tensor in state.values()
    ]
    values = torch.cat(flat).numpy() if flat else np.empty(0, dtype=np.float32)
    data = values.astype("<f4", copy=False).tobytes()
    return Array(dtype="float32", shape=(len(values),), stype=STYPE, data=data)


def unpack(array: Array, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Unpack what `pack` made of a state with these names and shapes.

    Raises
    ------
    PayloadError
        If the array is of another kind, or its number of values or bytes is off.
    """
    if (array.stype, array.dtype) != (STYPE, "float32"):
        raise PayloadError(
            f"the array is {array.stype} of {array.dtype}, not {STYPE} of float32"
        )
    sizes = [math.prod(shape) for shape in shapes.values()]
    if array.shape != (sum(sizes),) or len(array.data) != 4 * sum(sizes):
        raise PayloadError(
            f"the array has shape {tuple(array.shape)} and {len(array.data)} bytes, "
            f"not ({sum(sizes)},) and {4 * sum(sizes)}"
        )
    # A copy, since the bytes of a message are read-only.
    values = torch.from_numpy(np.frombuffer(array.data, dtype="<f4").astype(np.float32))
    parts = values.split(sizes)
    return {
        name: part.view(tuple(shape))
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }
