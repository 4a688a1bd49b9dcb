"""The encoding of whole numbers in as few bits as their magnitudes need.

Sums of updates are noise of a few bits less than their magnitude, so that no general
compression is as small. Blocks of `BLOCK` values share a number of bits, that of their
largest magnitude and a sign; trailing zero bits that all values have are left out. Of
Gaussian values it is about one bit a value over their entropy. The bytes are

    shift     one byte: the number of those zero bits
    widths    one byte per block: bits per value, up to 64
    codes     of the blocks of each width in turn, the narrowest first

A value v is coded as 2v, or as -2v - 1 if negative. The codes of a width are written in
parts of 64, 32, 16, 8, 4, 2 and 1 bits, the lowest bits in the largest part, which
NumPy packs fast: 38 bits are a part of 32, one of 4 and one of 2.
"""

import numpy as np
from numpy.typing import NDArray

from slora_flwr.wire.packing import PayloadError

BLOCK = 128
_WORDS = ((64, "<u8"), (32, "<u4"), (16, "<u2"), (8, "<u1"))
_FRACTIONS = (4, 2, 1)
# Seven codes of each width.
_MOST_PADDING = 7 * sum(range(65)) // 8

Codes = NDArray[np.uint64]


def most_bytes(count: int) -> int:
    """Return the largest possible number of bytes of `count` values."""
    return 1 + _blocks(count) + 8 * count + _MOST_PADDING


def encode_integers(values: NDArray[np.int64]) -> bytes:
    """Encode values, int64, shape (n,)."""
    joined = int(np.bitwise_or.reduce(values, initial=0))
    shift = max((joined & -joined).bit_length() - 1, 0)
    whole = values >> shift
    codes = np.bitwise_xor(whole << 1, whole >> 63).view(np.uint64)
    blocks = np.pad(codes, (0, -len(codes) % BLOCK)).reshape(-1, BLOCK)
    widths = _bit_lengths(np.bitwise_or.reduce(blocks, axis=1))
    of_each = _per_value(widths, len(codes))
    packed = [_pack(codes[of_each == width], width) for width in _occurring(widths)]
    return b"".join([bytes([shift]), widths.tobytes(), *packed])


def decode_integers(data: bytes, count: int) -> NDArray[np.int64]:
    """Decode `count` values, int64.

    Raises
    ------
    PayloadError
        If the bytes do not encode so many values.
    """
    body = 1 + _blocks(count)
    if len(data) < body:
        raise PayloadError(f"{len(data)} bytes of whole numbers, fewer than {body}")
    shift, widths = data[0], np.frombuffer(data[1:body], np.uint8)
    widest = int(widths.max(initial=0))
    if shift + max(widest, 1) > 64:
        raise PayloadError(
            f"whole numbers of {widest} bits, shifted by {shift}; allowed: up to 64 in "
            "all"
        )
    of_each = _per_value(widths, count)
    places = {width: np.flatnonzero(of_each == width) for width in _occurring(widths)}
    sizes = {width: -(-len(at) // 8) * width for width, at in places.items()}
    wanted = body + sum(sizes.values())
    if len(data) != wanted:
        raise PayloadError(f"{len(data)} bytes of whole numbers, not {wanted}")
    codes = np.zeros(count, np.uint64)
    for width, at in places.items():
        codes[at] = _unpack(data[body : body + sizes[width]], width)[: len(at)]
        body += sizes[width]
    whole = (codes >> np.uint64(1)).view(np.int64)
    whole ^= -(codes & np.uint64(1)).view(np.int64)
    return whole << shift


def _blocks(count: int) -> int:
    return -(-count // BLOCK)


def _per_value(widths: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    return np.repeat(widths, BLOCK)[:count]


def _occurring(widths: NDArray[np.uint8]) -> list[int]:
    """Return the widths of blocks that are not all zeros, ascending."""
    return [int(width) for width in np.unique(widths) if width]


def _bit_lengths(codes: Codes) -> NDArray[np.uint8]:
    """Return the number of bits up to the highest one that is set."""
    high, low = codes >> np.uint64(32), codes & np.uint64(2**32 - 1)
    # float64 holds 32 bits exactly.
    lengths = np.where(high > 0, np.frexp(high)[1] + 32, np.frexp(low)[1])
    return lengths.astype(np.uint8)


def _pack(codes: Codes, width: int) -> bytes:
    """Return codes of `width` bits each, padded to a multiple of 8 codes."""
    rest, parts = np.pad(codes, (0, -len(codes) % 8)), []
    for bits, word in _WORDS:
        if width & bits:
            parts.append(rest.astype(word).tobytes())
            rest = rest >> np.uint64(bits % 64)
    for bits in _FRACTIONS:
        if width & bits:
            part = rest.astype(np.uint8) & np.uint8(2**bits - 1)
            rest = rest >> np.uint64(bits)
            for held in (1, 2, 4):
                if held >= bits:
                    part = part[::2] | part[1::2] << np.uint8(held)
            parts.append(part.tobytes())
    return b"".join(parts)


def _unpack(data: bytes, width: int) -> Codes:
    """Return what `_pack` packed, with its padding."""
    count, start, place = 8 * len(data) // width, 0, 0
    codes = np.zeros(count, np.uint64)
    for bits, word in (*_WORDS, *((bits, "") for bits in _FRACTIONS)):
        if not width & bits:
            continue
        if word:
            part = np.frombuffer(data, word, count, start)
        else:
            part = _spread(
                np.frombuffer(data, np.uint8, count * bits // 8, start), bits
            )
        codes |= part.astype(np.uint64) << np.uint64(place)
        start, place = start + count * bits // 8, place + bits
    return codes


def _spread(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Return the fractions of bytes, the lowest first."""
    for held in (4, 2, 1):
        if held >= bits:
            low, high = packed & np.uint8(2**held - 1), packed >> np.uint8(held)
            packed = np.stack([low, high], axis=1).ravel()
    return packed
