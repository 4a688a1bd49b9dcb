"""The packed form of a state: one flat array.

Flower moves one 20 MB array about five times as fast as the same bytes in hundreds of
arrays, so a message carries a state as one array. Names and shapes are not sent: both
sides know them from the phase, and compare a fingerprint of them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Array
from numpy.typing import NDArray
from torch import Tensor

STYPE = "slora.packed"
_WIRE = {"float32": "<f4", "int64": "<i8"}


class PayloadError(ValueError):
    """A received array does not hold what it should."""


def pack(state: Mapping[str, Tensor], dtype: str = "float32") -> Array:
    """Return tensors packed in their order, little-endian.

    Parameters
    ----------
    state : Mapping[str, Tensor]
        The tensors.
    dtype : str
        `float32` for states and updates, `int64` for the sums of a fold.
    """
    values = flatten(state, dtype).astype(_WIRE[dtype], copy=False)
    return Array(dtype=dtype, shape=(len(values),), stype=STYPE, data=values.tobytes())


def flatten(state: Mapping[str, Tensor], dtype: str = "float32") -> NDArray[Any]:
    """Return a state's values as one vector."""
    flat = [tensor.detach().cpu().reshape(-1).numpy() for tensor in state.values()]
    return np.concatenate([np.empty(0, dtype), *flat], dtype=dtype, casting="unsafe")


def unpack(
    array: Array, shapes: Mapping[str, Sequence[int]], dtype: str = "float32"
) -> dict[str, Tensor]:
    """Return the state that `pack` packed, given its names and shapes.

    Raises
    ------
    PayloadError
        If the array is of another kind, or its number of values or bytes is wrong.
    """
    if (array.stype, array.dtype) != (STYPE, dtype):
        raise PayloadError(
            f"the array is {array.stype} of {array.dtype}, not {STYPE} of {dtype}"
        )
    sizes = [math.prod(shape) for shape in shapes.values()]
    wanted = sum(sizes) * np.dtype(dtype).itemsize
    if array.shape != (sum(sizes),) or len(array.data) != wanted:
        raise PayloadError(
            f"the array has shape {tuple(array.shape)} and {len(array.data)} bytes, "
            f"not ({sum(sizes)},) and {wanted}"
        )
    # Copied, since the bytes of a message are read-only.
    values = torch.from_numpy(np.frombuffer(array.data, _WIRE[dtype]).astype(dtype))
    parts = values.split(sizes)
    return {
        name: part.view(tuple(shape))
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }
