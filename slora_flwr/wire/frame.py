"""A frame around encoded bytes: length, checksum and lossless compression.

Compression pays if the bytes are not noise: signs and exponents of floats, mostly small
whole numbers, and differences from what the other side already has. Bytes of equal
significance are grouped and compressed by zstd.
"""

import struct
import zlib
from functools import cache

import numpy as np
import pyarrow as pa

from slora_flwr.wire.packing import PayloadError

# How the bytes are stored, their number, and their CRC-32.
_HEADER = struct.Struct("<BQI")
HEADER_SIZE = _HEADER.size
_STORED, _COMPRESSED, _DIFFERENCE = range(3)


def wrap(data: bytes, itemsize: int, *, compress: bool, known: bytes = b"") -> bytes:
    """Return a frame around bytes.

    Parameters
    ----------
    data : bytes
        The bytes to frame.
    itemsize : int
        Bytes per item (whole number or float): 1, 2 or 4.
    compress : bool
        True to use zstd if that makes the bytes smaller.
    known : bytes
        Bytes of the same length that the reader holds: only the difference from them
        is compressed. Empty if there are none.
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
    """Return the bytes in a frame.

    Parameters
    ----------
    frame : bytes
        The result of `wrap`.
    itemsize, known
        As for `wrap`.
    most : int
        Largest number of bytes accepted; no more memory than that is allocated.

    Raises
    ------
    PayloadError
        If the frame is truncated, damaged or too large, or holds a difference from
        bytes other than `known`.
    """
    if len(frame) < HEADER_SIZE:
        raise PayloadError(f"a frame of {len(frame)} bytes is shorter than its header")
    way, length, checksum = _HEADER.unpack_from(frame)
    stored = frame[HEADER_SIZE:]
    if length > most:
        raise PayloadError(f"a frame holds {length} bytes; allowed: up to {most}")
    if way not in (_STORED, _COMPRESSED, _DIFFERENCE):
        raise PayloadError(f"a frame of kind {way}; allowed: 0 to 2")
    data = stored
    if way != _STORED:
        data = _unshuffle(_expand(stored, length), itemsize)
    if len(data) != length:
        raise PayloadError(f"a frame of {len(data)} bytes claims to hold {length}")
    if way == _DIFFERENCE:
        if len(known) != length:
            raise PayloadError("a difference from bytes that are not known here")
        data = _add(data, known, itemsize)
    if zlib.crc32(data) != checksum:
        raise PayloadError("the frame is damaged: its checksum does not match")
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
    """Group bytes by significance: first bytes of all items first, then the second."""
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
    for i, plane in enumerate(planes):  # faster than copying the transpose
        items[:, i] = plane
    return items.tobytes() + data[cut:]


def _subtract(data: bytes, known: bytes, itemsize: int) -> bytes:
    """Return the differences of items, read as whole numbers, in zigzag code.

    A difference d is coded as 2d, or as -2d - 1 if negative, so that small differences
    of either sign have zeros in their high bytes.
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
