"""The encoding of a state: a share of its values, quantised and compressed.

With `float32`, all values and no compression, it is the array that
`slora_flwr.wire.packing` makes, byte for byte. Otherwise it is a frame
(`slora_flwr.wire.frame`) around

    codes         of the adapter's values, then of the head's, see .quantize
    scales        likewise
    positions     of the values, if only a share is sent, see .positions

Adapter and head have separate scales and shares, since a head has few values, of a
different magnitude.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import Array
from numpy.typing import NDArray
from torch import Tensor

from slora_flwr.common.tensors import State
from slora_flwr.config import DownloadConfig, UploadConfig
from slora_flwr.wire.frame import HEADER_SIZE, unwrap, wrap
from slora_flwr.wire.packing import (
    STYPE,
    PayloadError,
    check_kind,
    count_values,
    flatten,
    pack,
    unflatten,
    unpack,
)
from slora_flwr.wire.positions import (
    decode_positions,
    encode_positions,
    entropy_bound,
    most_bytes,
)
from slora_flwr.wire.quantize import codes_size, dequantize, quantize, scales_size

CODED = "slora.coded"
_ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "int4": 1}


@dataclass(frozen=True)
class Codec:
    """How states are encoded.

    Attributes
    ----------
    dtype : str
        Type of the values: `float32`, `float16`, `bfloat16`, `int8` or `int4`.
    share : float
        Share of the values that is sent; 0 for all.
    lossless : bool
        True to compress the encoded bytes if that makes them smaller.
    head : int
        Number of values at the end of a state that belong to the head.
    """

    dtype: str = "float32"
    share: float = 0.0
    lossless: bool = False
    head: int = 0

    @classmethod
    def of_upload(cls, config: UploadConfig, is_selection: bool, head: int) -> "Codec":
        """Return the codec of updates; `upload.top-k` ignores those of a selection."""
        every = is_selection or config.top_k == 1
        share = 0.0 if every else config.top_k
        return cls(config.dtype, share, config.lossless, head)

    @classmethod
    def of_download(cls, config: DownloadConfig, head: int) -> "Codec":
        """Return the codec of states."""
        return cls(config.dtype, lossless=config.lossless, head=head)

    @property
    def is_plain(self) -> bool:
        """Whether states are only packed."""
        return self.is_exact and not self.lossless

    @property
    def stype(self) -> str:
        """The array's `stype`: Flower's name for the format of its bytes."""
        return STYPE if self.is_plain else CODED

    @property
    def is_exact(self) -> bool:
        """Whether decoding returns exactly what was encoded."""
        return self.dtype == "float32" and not self.share

    def parts(self, count: int) -> list[int]:
        """Return how many values are sent of a state: the adapter's, the head's."""
        groups = [count - self.head, self.head]
        if self.share:
            return [math.ceil(self.share * group) for group in groups]
        return groups

    def size(self, count: int) -> int:
        """Return the bytes of a state of `count` values, before compression.

        If a share is sent, the positions are counted by the bound of their entropy.
        """
        if self.is_plain:
            return 4 * count
        size = HEADER_SIZE + self._codes_size(count) + self._scales_size(count)
        if self.share:
            size += math.ceil(entropy_bound(sum(self.parts(count)), count))
        return size

    def most(self, count: int) -> int:
        """Return the largest possible number of bytes of a state of `count` values."""
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
        known: bytes = b"",
    ) -> Array:
        """Encode a state.

        Parameters
        ----------
        state : Mapping[str, Tensor]
            The state, float32 and finite.
        chosen : NDArray[np.int64] or None
            If a share is sent, the ascending positions of its values in the flattened
            state, as many as `parts` returns; None for all values.
        stream : numpy.random.Philox or None
            Source of stochastic rounding; None to round to nearest.
        known : bytes
            As for `seal`.
        """
        if self.is_plain:
            return pack(state)
        count = sum(tensor.numel() for tensor in state.values())
        return self.seal(self.write(state, chosen, stream), count, known)

    def decode(
        self, array: Array, shapes: Mapping[str, Sequence[int]], known: bytes = b""
    ) -> State:
        """Decode a state of the given names and shapes; values not sent are 0.

        Raises
        ------
        PayloadError
            If the array does not hold such a state.
        """
        if self.is_plain:
            return unpack(array, shapes)
        return self.read(self.open(array, count_values(shapes), known), shapes)

    def write(
        self,
        state: Mapping[str, Tensor],
        chosen: NDArray[np.int64] | None = None,
        stream: np.random.Philox | None = None,
    ) -> bytes:
        """Return the bytes of a state's values, without a frame."""
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
        """Return the state that `write` wrote.

        Raises
        ------
        PayloadError
            If the bytes cannot hold a state of these shapes.
        """
        count = count_values(shapes)
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
        return unflatten(flat, shapes)

    def seal(self, data: bytes, count: int, known: bytes = b"") -> Array:
        """Return the array to send, given what `write` returned.

        Parameters
        ----------
        data : bytes
            The result of `write`.
        count : int
            Number of values in the whole state.
        known : bytes
            An earlier result of `write` that the reader holds; empty if there is none.
        """
        itemsize = _ITEM_SIZES[self.dtype]
        framed = wrap(data, itemsize, compress=self.lossless, known=known)
        return Array(dtype=self.dtype, shape=(count,), stype=self.stype, data=framed)

    def open(self, array: Array, count: int, known: bytes = b"") -> bytes:
        """Return what was given to `seal`.

        Raises
        ------
        PayloadError
            If the array is of another kind, or cannot hold a state of `count` values.
        """
        check_kind(array, self.stype, self.dtype, count)
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
