"""Whole numbers modulo a power of two: what masked values are summed in."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slora_flwr.secure.errors import SecureError

_BITS = (16, 24, 32)
# Figures beside the values, in 64 bits: a handful, whatever the model's size.
FIGURES = np.dtype("<u8")


@dataclass(frozen=True)
class Ring:
    """The whole numbers modulo 2^bits.

    Attributes
    ----------
    bits : int
        16, 24 or 32.
    """

    bits: int

    @classmethod
    def for_sum(cls, largest: int) -> "Ring":
        """Return the smallest ring for sums of magnitudes up to `largest`.

        Raises
        ------
        ValueError
            If none is large enough.
        """
        for bits in _BITS:
            if largest <= cls(bits).reach:
                return cls(bits)
        raise ValueError(f"sums of up to {largest} exceed {_BITS[-1]} bits")

    @property
    def reach(self) -> int:
        """The largest magnitude of a sum that it tells from others."""
        return 2 ** (self.bits - 1) - 1

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The type to compute in: 24 bits are the lower ones of 32."""
        return np.dtype("<u2" if self.bits == 16 else "<u4")

    @property
    def item_size(self) -> int:
        """Bytes of a number on the wire."""
        return self.bits // 8

    def zeros(self, count: int) -> NDArray[np.unsignedinteger]:
        """Return so many zeros."""
        return np.zeros(count, self.dtype)

    def pack(self, values: NDArray[np.unsignedinteger]) -> bytes:
        """Return the bytes of numbers, little-endian, `item_size` each."""
        if self.bits == 24:
            return values.view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
        return values.tobytes()

    def unpack(self, data: bytes, count: int) -> NDArray[np.unsignedinteger]:
        """Return the numbers in their bytes.

        Raises
        ------
        SecureError
            If there are not `count` of them.
        """
        if len(data) != count * self.item_size:
            size = f"{count} numbers of {self.bits} bits"
            raise SecureError(f"{len(data)} masked bytes; {size} have another size")
        if self.bits == 24:
            values = np.zeros((count, 4), np.uint8)
            values[:, :3] = np.frombuffer(data, np.uint8).reshape(-1, 3)
            return values.reshape(-1).view(self.dtype)
        return np.frombuffer(data, self.dtype)

    def centred(self, values: NDArray[np.unsignedinteger]) -> NDArray[np.int64]:
        """Return the numbers of least magnitude that numbers of the ring stand for."""
        whole = values.astype(np.int64) & (2**self.bits - 1)
        whole[whole > self.reach] -= 2**self.bits
        return whole
