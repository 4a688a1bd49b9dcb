"""The encoding of the base from which a phase starts: a codec for each of its parts.

Training starts from the factors that the base gives up, whatever these are: where both
are made from the same rounded factors, the function does not change. So they travel in
few bits, apart from the values, which are as exact as states.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from slora_flwr.config import DownloadConfig
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.packing import count_values, joined_size

T = TypeVar("T")


@dataclass(frozen=True)
class BaseCodec:
    """How a base is encoded.

    Attributes
    ----------
    values : Codec
        Codec of the sparse values, and of a frozen A that the base does not give up.
    factors : Codec
        Codec of the factors that the base gives up.
    """

    values: Codec
    factors: Codec

    @classmethod
    def of(cls, config: DownloadConfig) -> "BaseCodec":
        """Return the codec of bases."""
        return cls(
            Codec(config.dtype, lossless=config.lossless),
            Codec(config.base_dtype, lossless=config.lossless),
        )

    def size(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Return the bytes of a base of a layout, before compression; 0 for W_0."""
        if not shapes:
            return 0
        values, factors = map(count_values, split_base(shapes))
        return joined_size([self.values.size(values), self.factors.size(factors)])


def split_base(named: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """Return what a base gives by name: of its values, and of the factors given up."""
    gives_up = any(name.endswith(".b") for name in named)
    factors = {n: x for n, x in named.items() if gives_up and n.endswith((".a", ".b"))}
    return {n: x for n, x in named.items() if n not in factors}, factors
