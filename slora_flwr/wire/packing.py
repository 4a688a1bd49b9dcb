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


class PayloadError(ValueError):
    """A received array does not hold what it should."""


def pack(state: Mapping[str, Tensor]) -> Array:
    """Return tensors packed in their order, float32, little-endian."""
    values = flatten(state).astype("<f4", copy=False)
    return Array("float32", (len(values),), STYPE, values.tobytes())


def flatten(state: Mapping[str, Tensor], dtype: str = "float32") -> NDArray[Any]:
    """Return a state's values as one vector."""
    flat = [tensor.detach().cpu().reshape(-1).numpy() for tensor in state.values()]
    return np.concatenate([np.empty(0, dtype), *flat], dtype=dtype, casting="unsafe")


def unflatten(
    values: NDArray[Any], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Return the state of the given shapes whose values a vector holds."""
    parts = torch.from_numpy(values).split([math.prod(s) for s in shapes.values()])
    return {
        name: part.view(tuple(shape))
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def count_values(shapes: Mapping[str, Sequence[int]]) -> int:
    """Return the number of values in a state of the given shapes."""
    return sum(math.prod(shape) for shape in shapes.values())


def unpack(array: Array, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return the state that `pack` packed, given its names and shapes.

    Raises
    ------
    PayloadError
        If the array is of another kind, or its number of values or bytes is wrong.
    """
    count = count_values(shapes)
    check_kind(array, STYPE, "float32", count)
    if len(array.data) != 4 * count:
        raise PayloadError(f"the array has {len(array.data)} bytes, not {4 * count}")
    # Copied, since the bytes of a message are read-only.
    return unflatten(np.frombuffer(array.data, "<f4").astype(np.float32), shapes)


def check_kind(array: Array, stype: str, dtype: str, count: int) -> None:
    """Check what an array says of itself.

    Raises
    ------
    PayloadError
        If it is not of this `stype` and type, or has another shape than (count,).
    """
    given = (array.stype, array.dtype, tuple(array.shape))
    if given != (stype, dtype, (count,)):
        raise PayloadError(
            f"the array is {given[0]} of {given[1]} with shape {given[2]}, not "
            f"{stype} of {dtype} with ({count},)"
        )


_LENGTH = 8


def join(parts: Sequence[bytes]) -> bytes:
    """Return byte strings as one, for `split`."""
    return b"".join([*(len(p).to_bytes(_LENGTH, "little") for p in parts), *parts])


def joined_size(sizes: Sequence[int]) -> int:
    """Return the length of what `join` returns of strings of the given lengths."""
    return sum(sizes) + _LENGTH * len(sizes)


def split(data: bytes, count: int) -> list[bytes]:
    """Return the byte strings that `join` joined.

    Raises
    ------
    PayloadError
        If there are not so many.
    """
    at, parts = _LENGTH * count, []
    lengths = [
        int.from_bytes(data[i : i + _LENGTH], "little") for i in range(0, at, _LENGTH)
    ]
    if len(data) != joined_size(lengths):
        raise PayloadError(f"{len(data)} bytes do not hold {count} parts")
    for length in lengths:
        parts.append(data[at : at + length])
        at += length
    return parts
