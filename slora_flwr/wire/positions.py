"""Positions of chosen values, ascending, in about as many bits as they carry.

A set of k out of n positions carries log2(n over k) bits if all sets are equally
likely. Here each gap to the next position is a byte, or several where it is wide, and
a Huffman code over the bytes (Deflate, RFC 1951, without matches) does the rest: at
most 2% above that bound for 10,000 positions or more and a share from 0.1% to 50%, 3%
for a thousand, since the code's table takes 30 to 100 bytes. Positions in clusters take
less.
"""

import math
import zlib

import numpy as np
from numpy.typing import NDArray

from slora_flwr.wire.packing import PayloadError

# A gap of this or more is a byte of it and the rest.
_WIDE = 255
# Where gaps are wider than this on average, their last 8 bits go apart.
_SPLIT = 128


def entropy_bound(count: int, size: int) -> float:
    """Give log2(size over count) in bytes."""
    ways = math.lgamma(size + 1) - math.lgamma(count + 1)
    return (ways - math.lgamma(size - count + 1)) / math.log(2) / 8


def most_bytes(count: int, size: int) -> int:
    """Bound the bytes that a reader takes in, before and after its expansion."""
    return 64 + 2 * count + size // _WIDE


def encode_positions(positions: NDArray[np.int64], size: int) -> bytes:
    """Write ascending positions below `size`."""
    if not len(positions):
        return b""
    gaps = np.diff(positions, prepend=-1) - 1
    low = b""
    if size > _SPLIT * len(positions):
        low = _huffman((gaps & 255).astype(np.uint8).tobytes())
        gaps >>= 8
    wide, rest = np.divmod(gaps, _WIDE)
    ends = np.cumsum(wide + 1)
    written = np.full(int(ends[-1]), _WIDE, dtype=np.uint8)
    written[ends - 1] = rest
    high = _huffman(written.tobytes())
    return len(high).to_bytes(4, "little") + high + low


def decode_positions(data: bytes, count: int, size: int) -> NDArray[np.int64]:
    """Read `count` positions below `size` back.

    Raises
    ------
    PayloadError
        If they are not that.
    """
    if not count:
        if data:
            raise PayloadError(f"{len(data)} bytes of positions, for none")
        return np.empty(0, dtype=np.int64)
    cut = 4 + int.from_bytes(data[:4], "little")
    written = np.frombuffer(_expand(data[4:cut], most_bytes(count, size)), np.uint8)
    is_end = written < _WIDE
    if np.count_nonzero(is_end) != count or not is_end[-1]:
        raise PayloadError(f"the positions are not {count}")
    # A gap is the sum of its bytes.
    sums = np.cumsum(written, dtype=np.int64)[is_end]
    gaps = np.diff(sums, prepend=0)
    if size > _SPLIT * count:
        low = np.frombuffer(_expand(data[cut:], count), np.uint8)
        if len(low) != count:
            raise PayloadError(f"the positions are not {count}")
        gaps = (gaps << 8) | low
    elif len(data) > cut:
        raise PayloadError(f"{len(data) - cut} bytes after the positions")
    positions = np.cumsum(gaps + 1) - 1
    if positions[-1] >= size:
        raise PayloadError(f"a position is {positions[-1]}; allowed: below {size}")
    return positions


def _huffman(data: bytes) -> bytes:
    # Raw Deflate: what travels has a checksum already.
    coder = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(data) + coder.flush()


def _expand(data: bytes, most: int) -> bytes:
    reader = zlib.decompressobj(-15)
    try:
        expanded = reader.decompress(data, most)
    except zlib.error as error:
        raise PayloadError(f"the positions cannot be read: {error}") from error
    if not reader.eof or reader.unused_data:
        raise PayloadError(f"the positions are not at most {most} bytes, or cut off")
    return expanded
