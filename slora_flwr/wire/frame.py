"""A frame around coded bytes: their length and checksum, and lossless compression.

The last step pays where the bytes are not noise: signs and exponents of floats, whole
numbers that are mostly small, and the difference to what the other side has already.
Bytes of equal significance are put together and handed to zstd.
"""

import struct
import zlib
from functools import cache

import numpy as np
import pyarrow as pa

from slora_flwr.wire.packing import PayloadError

# How the bytes are stored, how many they are, and their CRC-32.
_HEADER = struct.Struct("<BQI")
HEADER_SIZE = _HEADER.size
_STORED, _COMPRESSED, _DIFFERENCE = range(3)


def wrap(data: bytes, itemsize: int, *, compress: bool, known: bytes = b"") -> bytes:
    """Frame bytes.

    Parameters
    ----------
    data : bytes
        What to frame.
    itemsize : int
        Bytes of its items, whole numbers or floats: 1, 2 or 4.
    compress : bool
        Try zstd, and keep what it gives if that is smaller.
    known : bytes
        What the reader has, of the same length: only the difference is compressed
        then. Empty for nothing.
    """
    way, stored = _STORED, data
    if compress:
        source, found = data, _COMPRESSED
        if known:
            source, found = _subtract(data, known, itemsize), _DIFFERENCE
        compressed = _zstd().compress(_shuffle(source, itemsize), asbytes=True)
        if len(compressed) < len(data):
            way, stored = found, compressed
    return _HEADER.pack(way, len(data), zlib.crc32(data)) + stored


def unwrap(frame: bytes, itemsize: int, most: int, known: bytes = b"") -> bytes:
    """Give the bytes of a frame back.

    Parameters
    ----------
    frame : bytes
        By `wrap`.
    itemsize : int
        As there.
    most : int
        The bytes can be no more than this; nothing larger is made in memory.
    known : bytes
        As there.

    Raises
    ------
    PayloadError
        If the frame is cut off, damaged or too large, or a difference to something
        else.
    """
    if len(frame) < HEADER_SIZE:
        raise PayloadError(f"{len(frame)} bytes are no frame; a header has more")
    way, length, checksum = _HEADER.unpack_from(frame)
    stored = frame[HEADER_SIZE:]
    if length > most:
        raise PayloadError(f"a frame for {length} bytes; allowed: up to {most}")
    if way not in (_STORED, _COMPRESSED, _DIFFERENCE):
        raise PayloadError(f"a frame of kind {way}; allowed: 0 to 2")
    data = stored
    if way != _STORED:
        data = _unshuffle(_expand(stored, length), itemsize)
    if len(data) != length:
        raise PayloadError(f"a frame of {len(data)} bytes that says {length}")
    if way == _DIFFERENCE:
        if len(known) != length:
            raise PayloadError("a difference to what is not known here")
        data = _add(data, known, itemsize)
    if zlib.crc32(data) != checksum:
        raise PayloadError("the frame is damaged: its checksum is another")
    return data


@cache
def _zstd() -> pa.Codec:
    return pa.Codec("zstd", compression_level=1)


def _expand(stored: bytes, length: int) -> bytes:
    try:
        data = _zstd().decompress(stored, decompressed_size=length, asbytes=True)
    except (OSError, ValueError) as error:
        raise PayloadError(f"the frame cannot be expanded: {error}") from error
    return bytes(data)


def _shuffle(data: bytes, itemsize: int) -> bytes:
    """Put the first bytes of all items first, then the second ones."""
    if itemsize == 1:
        return data
    cut = len(data) - len(data) % itemsize
    items = np.frombuffer(data[:cut], np.uint8).reshape(-1, itemsize)
    return items.T.tobytes() + data[cut:]


def _unshuffle(data: bytes, itemsize: int) -> bytes:
    if itemsize == 1:
        return data
    cut = len(data) - len(data) % itemsize
    planes = np.frombuffer(data[:cut], np.uint8).reshape(itemsize, -1)
    items = np.empty(planes.shape[::-1], dtype=np.uint8)
    for i, plane in enumerate(planes):  # quicker than the transposed copy
        items[:, i] = plane
    return items.tobytes() + data[cut:]


def _subtract(data: bytes, known: bytes, itemsize: int) -> bytes:
    """Take items as whole numbers; give their differences, small ones as small codes.

    A difference d is 2d, or -2d - 1 where it is negative: so small negative ones too
    have zeros in their high bytes.
    """
    assert len(data) == len(known)
    cut = len(data) - len(data) % itemsize
    kind = f"<i{itemsize}"
    change = np.frombuffer(data[:cut], kind) - np.frombuffer(known[:cut], kind)
    codes = (change << 1) ^ (change >> (8 * itemsize - 1))
    return codes.tobytes() + data[cut:]


def _add(data: bytes, known: bytes, itemsize: int) -> bytes:
    cut = len(data) - len(data) % itemsize
    codes = np.frombuffer(data[:cut], f"<u{itemsize}")
    change = ((codes >> 1) ^ (-(codes & 1).astype(codes.dtype))).view(f"<i{itemsize}")
    return (np.frombuffer(known[:cut], f"<i{itemsize}") + change).tobytes() + data[cut:]
