"""Quantisation: values as codes of fewer bits, and back.

`int8` and `int4` quantise blocks of `BLOCK` values by the largest magnitude of each
block: a float32 scale, and whole multiples of it up to 127 or 7. `float16` and
`bfloat16` are the formats of these names, with overflows clipped to the largest finite
value.

Given a bit stream, rounding is stochastic and unbiased: up or down to a neighbouring
code, so that errors average out over clients and rounds (QSGD, arXiv 1610.02132).
Without one, values are rounded to nearest.
"""

import numpy as np
import torch
from numpy.typing import NDArray

BLOCK = 128
# Number of values processed at once, so that they stay in the processor's cache.
_CHUNK = 256 * BLOCK
_LEVELS = {"int8": 127, "int4": 7}
_CODE_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4}
# A little less than the largest float32, so that a code times its scale is finite.
_LARGEST = 3.4028e38
# float16 has fewer mantissa bits below.
_SMALL = np.float32(2.0**-14)
# The inverse of a smaller scale would overflow: such a block is coded as zeros.
_TINY = 1e-37

Values = NDArray[np.float32]


def codes_size(count: int, dtype: str) -> int:
    """Return the number of bytes in the codes of `count` values."""
    return -(-count * _CODE_BITS[dtype] // 8)


def scales_size(count: int, dtype: str) -> int:
    """Return the number of bytes in the scales of `count` values."""
    return 4 * -(-count // BLOCK) if dtype in _LEVELS else 0


def quantize(
    values: Values, dtype: str, stream: np.random.Philox | None = None
) -> tuple[bytes, bytes]:
    """Quantise values.

    Parameters
    ----------
    values : NDArray[np.float32]
        Finite values, shape (n,).
    dtype : str
        `float32`, `float16`, `bfloat16`, `int8` or `int4`.
    stream : numpy.random.Philox or None
        Source of stochastic rounding; None to round to nearest.

    Returns
    -------
    codes, scales : bytes
        `codes_size` and `scales_size` bytes, little-endian.
    """
    if dtype == "float32":
        return values.astype("<f4", copy=False).tobytes(), b""
    codes, scales = bytearray(), bytearray()
    for start in range(0, len(values), _CHUNK):
        part = values[start : start + _CHUNK]
        noise = None if stream is None else _noise(len(part), stream)
        if dtype == "float16":
            codes += _to_float16(part, noise).tobytes()
        elif dtype == "bfloat16":
            codes += _to_bfloat16(part, noise).tobytes()
        else:
            whole, scale = _to_integers(part, _LEVELS[dtype], noise)
            codes += (_to_nibbles(whole) if dtype == "int4" else whole).tobytes()
            scales += scale.tobytes()
    return bytes(codes), bytes(scales)


def dequantize(codes: bytes, scales: bytes, count: int, dtype: str) -> Values:
    """Return the values that codes stand for.

    Parameters
    ----------
    codes, scales : bytes
        The results of `quantize`.
    count : int
        Number of values.
    dtype : str
        As for `quantize`.

    Returns
    -------
    NDArray[np.float32]
        A writable array of shape (count,).
    """
    if dtype == "float32":
        return np.frombuffer(codes, "<f4").astype(np.float32)
    if dtype == "float16":
        halves = np.frombuffer(codes, "<f2").astype(np.float16)
        return torch.from_numpy(halves).float().numpy()
    if dtype == "bfloat16":
        bits = np.frombuffer(codes, "<u2").astype(np.uint32)
        return np.left_shift(bits, 16, out=bits).view(np.float32)
    if dtype == "int8":
        whole = np.frombuffer(codes, np.int8)
    else:
        pairs = np.frombuffer(codes, np.uint8)
        whole = np.empty(2 * len(pairs), np.int8)
        whole[::2], whole[1::2] = pairs & 15, pairs >> 4
        whole = whole[:count] - np.int8(8)
    values = whole.astype(np.float32)
    scale = np.frombuffer(scales, "<f4")
    full = count // BLOCK
    # Scales that `quantize` never writes can yield values that are not finite, which
    # the fold refuses.
    with np.errstate(over="ignore", invalid="ignore"):
        values[: full * BLOCK].reshape(full, BLOCK)[:] *= scale[:full, None]
        values[full * BLOCK :] *= scale[full:]
    return values


def _noise(count: int, stream: np.random.Philox) -> NDArray[np.uint16]:
    """Draw 16 random bits per value."""
    return stream.random_raw(-(-count // 4)).view(np.uint16)[:count]


def draw_unit(count: int, stream: np.random.Philox) -> Values:
    """Draw values from (0, 1), of 16 random bits each, for stochastic rounding."""
    return _unit(_noise(count, stream))


def _to_integers(
    values: Values, levels: int, noise: NDArray[np.uint16] | None
) -> tuple[NDArray[np.int8], Values]:
    count = len(values)
    blocks = np.pad(values, (0, -count % BLOCK)).reshape(-1, BLOCK)
    peaks = torch.from_numpy(blocks).abs().amax(dim=1).numpy()
    scales = np.minimum(peaks, np.float32(_LARGEST)) / np.float32(levels)
    scales[scales < _TINY] = 0
    inverse = np.zeros_like(scales)
    np.divide(1, scales, out=inverse, where=scales > 0)
    blocks *= inverse[:, None]
    scaled = blocks.reshape(-1)[:count]
    if noise is None:
        np.rint(scaled, out=scaled)
    else:
        scaled += _unit(noise)
        np.floor(scaled, out=scaled)
    np.clip(scaled, -levels, levels, out=scaled)
    return scaled.astype(np.int8), scales


def _unit(noise: NDArray[np.uint16]) -> Values:
    """Return, for each draw, the middle of one of 2^16 intervals of (0, 1).

    The mean of rounded values is then exact to 2^-17 of a step.
    """
    unit = np.multiply(noise, np.float32(2.0**-16), dtype=np.float32)
    unit += np.float32(2.0**-17)
    return unit


def _to_bfloat16(
    values: Values, noise: NDArray[np.uint16] | None
) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    added = noise if noise is not None else np.uint32(0x7FFF) + ((bits >> 16) & 1)
    halves = ((bits + added) >> 16).astype(np.uint16)
    # A carry into infinity becomes the largest finite value.
    halves -= (halves & 0x7FFF) == 0x7F80
    return halves


def _to_float16(
    values: Values, noise: NDArray[np.uint16] | None
) -> NDArray[np.float16]:
    if noise is None:
        near = np.clip(values, -65504, 65504)
        # torch converts with the processor's own instruction.
        return torch.from_numpy(near).half().numpy().astype("<f2", copy=False)
    # Below 2^-14 all steps of float16 are 2^-24, as those of float32 and float16 are in
    # the proportion of 2^-13 above: so smaller magnitudes are moved there, and back.
    sizes = np.abs(values)
    is_small = sizes < _SMALL
    sizes += is_small * _SMALL
    bits = sizes.view(np.uint32)
    # float32 has 13 more mantissa bits than float16, and its exponent is 112 greater.
    bits -= np.uint32(112 << 23)
    bits -= is_small.astype(np.uint32) << 23
    bits += noise >> 3
    bits >>= 13
    halves = np.minimum(bits, 0x7BFF).astype("<u2")
    halves |= (values.view(np.uint32) >> 16).astype("<u2") & 0x8000
    return halves.view("<f2")


def _to_nibbles(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    shifted = (codes + np.int8(8)).view(np.uint8)
    if len(shifted) % 2:
        shifted = np.append(shifted, np.uint8(8))
    return shifted[::2] | np.left_shift(shifted[1::2], 4, dtype=np.uint8)
