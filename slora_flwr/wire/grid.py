"""Updates as whole numbers on a grid that all clients of a round share.

Sums of such numbers are exact, and can be taken of masked ones. A grid for all must
reach as far as the largest value of any client, which would waste it on most: so the
update is rotated first. Its values then are about alike, and its length says how large
they are (Suresh et al., ICML 2017; Kairouz et al., ICML 2021).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy  # which imports scipy.fft when it is first used
from flwr.app import Array
from numpy.typing import NDArray
from torch import Tensor

from slora_flwr.common.random import key
from slora_flwr.common.tensors import State
from slora_flwr.wire.packing import flatten, unflatten
from slora_flwr.wire.quantize import draw_unit

# A rotated value of an update as long as the bound has at most about this many times
# the standard deviation; of a normal distribution six in ten million have more.
SPREAD = 5.0
# Steps from 0 to the largest value. Beyond, float32 would round a sum with the noise of
# stochastic rounding itself, and no longer without bias.
MOST_LEVELS = 2**19
# Allowance for float32's products.
_SLACK = 1 - 1e-6
# Roundings of an update before it is cut off instead, which one in 10^13 needs.
_MOST_TRIES = 64


@dataclass(frozen=True)
class Grid:
    """The grid of a round's updates.

    Attributes
    ----------
    count : int
        Number of values in an update.
    bound : float
        The largest L2 norm of an update.
    levels : int
        Steps from 0 to the largest value.
    seed : int
        The run's seed, from which the rotation follows.
    is_strict : bool
        Whether no rounded update is longer than `sensitivity`: those that are, are
        rounded again.
    """

    count: int
    bound: float
    levels: int
    seed: int
    is_strict: bool = False

    # Something is always lost to rounding.
    is_exact = False

    @cached_property
    def size(self) -> int:
        """Number of rotated values: the count, or a little more to rotate fast."""
        return int(scipy.fft.next_fast_len(self.count, real=True))

    @property
    def step(self) -> float:
        """The distance between neighbours on the grid."""
        return SPREAD * self.bound / math.sqrt(self.size) / self.levels

    @property
    def sensitivity(self) -> float:
        """The largest L2 norm of a rounded update, in steps.

        Of the roundings of any update that the bound allows, at least 1 - e^-1/2 are no
        longer than that (Kairouz et al., proposition 22).
        """
        length, size = self.bound / self.step, self.size
        likely = length**2 + size / 4 + length + math.sqrt(size) / 2
        return min(math.sqrt(likely), length + math.sqrt(size))

    @cached_property
    def _signs(self) -> NDArray[np.float32]:
        stream = np.random.Philox(key=key("rotation", self.seed))
        words = stream.random_raw(-(-self.size // 64))
        bits = np.unpackbits(words.astype("<u8").view(np.uint8))[: self.size]
        return 1 - 2 * bits.astype(np.float32)

    def encode(
        self,
        state: Mapping[str, Tensor],
        chosen: NDArray[np.int64] | None = None,
        stream: np.random.Philox | None = None,
    ) -> Array:
        """Return an update, float32, rotated and rounded: int32, shape (size,).

        Values beyond the grid, which are rare, become its ends.

        Parameters
        ----------
        state : Mapping[str, Tensor]
            The update, no longer than the bound.
        chosen : None
            No values can be chosen: positions would be the client's own.
        stream : numpy.random.Philox or None
            Source of stochastic rounding; None to round to nearest.
        """
        padded = np.zeros(self.size, np.float32)
        padded[: self.count] = flatten(state)
        padded *= self._signs
        rotated = scipy.fft.dct(padded, norm="ortho", overwrite_x=True)
        rotated /= np.float32(self.step)
        if self.is_strict:
            # What float32 made of it may be a little longer than the bound.
            length = float(np.linalg.norm(rotated.astype(np.float64)))
            if not math.isfinite(length):
                raise ValueError(f"an update of norm {length} has no place on a grid")
            most = self.bound / self.step * _SLACK
            rotated *= np.float32(min(1, most / length) if length else 1)
        codes = self._round(rotated, stream)
        tries = 1
        while self.is_strict and np.linalg.norm(codes) > self.sensitivity:
            # Towards 0 in the end, which lengthens nothing.
            tries += 1
            codes = self._round(rotated, stream, cut=tries > _MOST_TRIES)
        return Array("int32", (self.size,), "slora.grid", codes.tobytes())

    def _round(
        self,
        rotated: NDArray[np.float32],
        stream: np.random.Philox | None,
        *,
        cut: bool = False,
    ) -> NDArray[np.int32]:
        """Return values on the grid, none beyond its ends."""
        if cut:
            rounded = np.trunc(rotated)
        elif stream is None:
            rounded = np.rint(rotated)
        else:
            rounded = rotated + draw_unit(self.size, stream)
            np.floor(rounded, out=rounded)
        np.clip(rounded, -self.levels, self.levels, out=rounded)
        return rounded.astype("<i4")

    def codes(self, array: Array) -> NDArray[np.int32]:
        """Return the whole numbers of an encoded update."""
        return np.frombuffer(array.data, "<i4")

    def decode(self, array: Array, shapes: Mapping[str, Sequence[int]]) -> State:
        """Return the update that `encode` wrote, of the given shapes."""
        return self.place(self.codes(array), 1, shapes)

    def place(
        self,
        codes: NDArray[np.signedinteger],
        weight: int,
        shapes: Mapping[str, Sequence[int]],
    ) -> State:
        """Return the mean update, float32, of a sum of weighted whole numbers."""
        rotated = codes.astype(np.float64) * (self.step / weight)
        values = scipy.fft.idct(rotated, norm="ortho", overwrite_x=True)[: self.count]
        values *= self._signs[: self.count]
        return unflatten(values.astype(np.float32), shapes)
