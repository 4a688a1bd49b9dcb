"""A state as the bytes that travel: a share of its values, in few bits, compressed.

With `float32`, all values and no compression that is `slora_flwr.wire.packing`'s array,
byte for byte. Else it is a frame (`slora_flwr.wire.frame`) around

    codes         of the values of the adapter, then of the head's, see .quantize
    scales        likewise
    positions     of the values, where only a share travels, see .positions

The two parts of a state have scales and shares of their own, since a head's values are
few and not of an adapter's size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from flwr.app import Array
from numpy.typing import NDArray
from torch import Tensor

from slora_flwr.common.tensors import State
from slora_flwr.config import DownloadConfig, UploadConfig
from slora_flwr.wire.frame import HEADER_SIZE, unwrap, wrap
from slora_flwr.wire.packing import STYPE, PayloadError, flatten, pack, unpack
from slora_flwr.wire.positions import (
    decode_positions,
    encode_positions,
    entropy_bound,
    most_bytes,
)
from slora_flwr.wire.quantize import codes_size, dequantize, quantize, scales_size

CODED = "slora.coded"
_ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "int4": 1}


def subtract(state: State, reference: State) -> State:
    """Give a state's difference to a reference, whose missing names are zeros."""
    return {n: t - reference[n] if n in reference else t for n, t in state.items()}


def add(change: State, reference: State) -> State:
    """Give the state whose difference that is, as it was read."""
    return {n: t + reference[n] if n in reference else t for n, t in change.items()}


@dataclass(frozen=True)
class Codec:
    """How states are written.

    Attributes
    ----------
    dtype : str
        Of the values: `float32`, `float16`, `bfloat16`, `int8` or `int4`.
    share : float
        Of the values that travel; 0 for all.
    lossless : bool
        Whether to compress what that gives, where it gets smaller.
    head : int
        How many values at the end of a state are the head's.
    """

    dtype: str = "float32"
    share: float = 0.0
    lossless: bool = False
    head: int = 0

    @classmethod
    def of_upload(cls, config: UploadConfig, is_selection: bool, head: int) -> "Codec":
        """Return the one of updates; those that are a selection travel whole."""
        every = is_selection or config.top_k == 1
        share = 0.0 if every else config.top_k
        return cls(config.dtype, share, config.lossless, head)

    @classmethod
    def of_download(cls, config: DownloadConfig, head: int) -> "Codec":
        """Give the one of states."""
        return cls(config.dtype, lossless=config.lossless, head=head)

    @property
    def is_plain(self) -> bool:
        """Whether states travel as they are."""
        return self.is_exact and not self.lossless

    @property
    def stype(self) -> str:
        """Flower's name for the format of an array's bytes."""
        return STYPE if self.is_plain else CODED

    @property
    def is_exact(self) -> bool:
        """Whether what is read is what was written."""
        return self.dtype == "float32" and not self.share

    def parts(self, count: int) -> list[int]:
        """Count the values that travel of a state of so many: adapter's, head's."""
        groups = [count - self.head, self.head]
        if self.share:
            return [math.ceil(self.share * group) for group in groups]
        return groups

    def size(self, count: int) -> int:
        """Count the bytes of a state of so many values, before compression.

        Where a share travels, its positions count with the bound of their entropy.
        """
        if self.is_plain:
            return 4 * count
        size = HEADER_SIZE + self._codes_size(count) + self._scales_size(count)
        if self.share:
            size += math.ceil(entropy_bound(sum(self.parts(count)), count))
        return size

    def most(self, count: int) -> int:
        """Bound the bytes of a state of so many values."""
        if self.is_plain:
            return 4 * count
        most = HEADER_SIZE + self._codes_size(count) + self._scales_size(count)
        if self.share:
            most += most_bytes(sum(self.parts(count)), count)
        return most

    def encode(
        self,
        state: Mapping[str, Tensor],
        chosen: NDArray[np.int64] | None = None,
        stream: np.random.Philox | None = None,
    ) -> Array:
        """Write a state.

        Parameters
        ----------
        state : Mapping[str, Tensor]
            float32, finite.
        chosen : NDArray[np.int64] or None
            Where a share travels, the positions of its values, ascending, in the state
            as one vector, as many as `parts` says; None for all.
        stream : numpy.random.Philox or None
            For stochastic rounding; None for rounding to the nearest.
        """
        if self.is_plain:
            return pack(state)
        count = sum(tensor.numel() for tensor in state.values())
        return self.seal(self.write(state, chosen, stream), count)

    def decode(self, array: Array, shapes: Mapping[str, Sequence[int]]) -> State:
        """Read a state of these names and shapes; values that did not travel are 0.

        Raises
        ------
        PayloadError
            If the array is not one of such a state.
        """
        if self.is_plain:
            return unpack(array, shapes)
        count = sum(math.prod(shape) for shape in shapes.values())
        return self.read(self.open(array, count), shapes)

    def write(
        self,
        state: Mapping[str, Tensor],
        chosen: NDArray[np.int64] | None = None,
        stream: np.random.Philox | None = None,
    ) -> bytes:
        """Write the bytes of a state's values, without a frame."""
        values = flatten(state)
        if self.is_exact:
            return values.astype("<f4", copy=False).tobytes()
        count, positions = len(values), b""
        if self.share:
            assert chosen is not None
            positions = encode_positions(chosen, count)
            values = values[chosen]
        cut, _ = self.parts(count)
        codes, scales = quantize(values[:cut], self.dtype, stream)
        more_codes, more_scales = quantize(values[cut:], self.dtype, stream)
        return codes + more_codes + scales + more_scales + positions

    def read(self, data: bytes, shapes: Mapping[str, Sequence[int]]) -> State:
        """Read what `write` wrote.

        Raises
        ------
        PayloadError
            If it cannot be a state of these shapes.
        """
        sizes = [math.prod(shape) for shape in shapes.values()]
        count = sum(sizes)
        scales = self._codes_size(count)
        end = scales + self._scales_size(count)
        if len(data) < end or (len(data) > end and not self.share):
            raise PayloadError(f"{len(data)} bytes of values, not {end}")
        code_at, values = 0, []
        for part in self.parts(count):
            code_end = code_at + codes_size(part, self.dtype)
            scale_end = scales + scales_size(part, self.dtype)
            codes = data[code_at:code_end]
            values.append(dequantize(codes, data[scales:scale_end], part, self.dtype))
            code_at, scales = code_end, scale_end
        flat = np.concatenate(values)
        if self.share:
            positions = decode_positions(data[end:], len(flat), count)
            sent, flat = flat, np.zeros(count, dtype=np.float32)
            flat[positions] = sent
        parts = torch.from_numpy(flat).split(sizes)
        return {
            name: part.view(tuple(shape))
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }

    def seal(self, data: bytes, count: int, known: bytes = b"") -> Array:
        """Make the array that travels of what `write` wrote.

        Parameters
        ----------
        data : bytes
            By `write`.
        count : int
            Values of the whole state.
        known : bytes
            What `write` wrote before, and the reader has; empty for nothing.
        """
        itemsize = _ITEM_SIZES[self.dtype]
        framed = wrap(data, itemsize, compress=self.lossless, known=known)
        return Array(dtype=self.dtype, shape=(count,), stype=self.stype, data=framed)

    def open(self, array: Array, count: int, known: bytes = b"") -> bytes:
        """Give what `write` wrote back.

        Raises
        ------
        PayloadError
            If the array is of another kind, or cannot hold a state of so many values.
        """
        given = (array.stype, array.dtype, tuple(array.shape))
        if given != (self.stype, self.dtype, (count,)):
            raise PayloadError(
                f"the array is {given[0]} of {given[1]} with shape {given[2]}, not "
                f"{self.stype} of {self.dtype} with ({count},)"
            )
        most = self.most(count)
        if len(array.data) > most:
            told = f"the array has {len(array.data)} bytes; allowed: up to {most}"
            raise PayloadError(told)
        itemsize = _ITEM_SIZES[self.dtype]
        return unwrap(array.data, itemsize, most - HEADER_SIZE, known)

    def _codes_size(self, count: int) -> int:
        return sum(codes_size(part, self.dtype) for part in self.parts(count))

    def _scales_size(self, count: int) -> int:
        return sum(scales_size(part, self.dtype) for part in self.parts(count))


def name_version(data: bytes) -> str:
    """Name a version: BLAKE2b of what `Codec.write` gave, 32 hex digits."""
    return blake2b(data, digest_size=16).hexdigest()
