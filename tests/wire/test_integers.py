"""Whole numbers in as few bits as their magnitudes need."""

import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slora_flwr.wire.integers import (
    BLOCK,
    decode_integers,
    encode_integers,
    most_bytes,
)
from slora_flwr.wire.packing import PayloadError

INT64 = st.integers(-(2**63), 2**63 - 1)


def integers(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@settings(max_examples=200)
@given(values=st.lists(st.one_of(INT64, st.integers(-9, 9)), max_size=300))
def test_any_values_come_back(values: list[int]) -> None:
    data = encode_integers(integers(*values))
    assert len(data) <= most_bytes(len(values))
    read = decode_integers(data, len(values))
    assert (read.tolist(), read.dtype) == (values, np.int64)


@pytest.mark.parametrize("width", range(1, 65))
@pytest.mark.parametrize("count", [1, 8, BLOCK, BLOCK + 1, 1000])
def test_every_width_and_length_comes_back(width: int, count: int) -> None:
    words = np.random.default_rng(width).integers(0, 2**64, count, dtype=np.uint64)
    values = words.view(np.int64) >> (64 - width)
    assert decode_integers(encode_integers(values), count).tolist() == values.tolist()


def test_known_bytes() -> None:
    """By hand: 1, -1, 2 and 5 are coded as 2, 1, 4 and 10, of 4 bits each."""
    data = encode_integers(integers(1, -1, 2, 5))
    # No shift, one block of 4 bits; a byte has two codes, the first in its low half,
    # and zeros fill up to 8 codes.
    assert data == bytes([0, 4, 2 | 1 << 4, 4 | 10 << 4, 0, 0])
    # A multiple of 8 as if it were not; 11 bits are a part of 8 bits, of 2 and of 1.
    data = encode_integers(integers(8 * 601, -8 * 2))
    # 1202 = 0b100_1011_0010 and 3.
    low, two, one = [0b10110010, 3], [0b00], [1]
    assert data == bytes([3, 11, *low, *[0] * 6, *two, 0, *one])


def test_parts_of_whole_bytes_are_little_endian() -> None:
    # 2^40 and -2^40 are coded with 42 bits: 32, then 8, then 2.
    first, second = 2**41 + 2 * 3, 2**41 - 1
    codes = [first, second, *[0] * 6]
    parts = [
        struct.pack("<8I", *(code % 2**32 for code in codes)),
        bytes(code >> 32 & 255 for code in codes),
        bytes([first >> 40 | second >> 40 << 2, 0]),
    ]
    assert encode_integers(integers(2**40 + 3, -(2**40))) == b"\0\x2a" + b"".join(parts)


def test_sizes_by_hand() -> None:
    """A byte, one per block, and the bits of a block's largest value with a sign."""
    assert len(encode_integers(integers())) == 1
    assert len(encode_integers(np.zeros(1000, np.int64))) == 1 + 8
    # 2^20 - 1 and its sign take 21 bits, 127 and its sign 8.
    small, large = np.full(BLOCK, 127), np.full(BLOCK, 2**20 - 1)
    values = np.concatenate([small, large, -small])
    assert len(encode_integers(values)) == 1 + 3 + BLOCK * (21 + 2 * 8) // 8
    # All are multiples of 16.
    assert len(encode_integers(values << 4)) == len(encode_integers(values))


def test_gaussian_values_take_about_their_entropy() -> None:
    """log2(2^30) and log2(sqrt(2πe)) bits, and little more than 1 beyond."""
    values = (np.random.default_rng(0).normal(size=100_000) * 2**30).astype(np.int64)
    entropy = 30 + 0.5 * np.log2(2 * np.pi * np.e)
    bits = 8 * len(encode_integers(values)) / len(values)
    assert entropy < bits < entropy + 1.2


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",  # no width
        bytes([0, 4, 0, 0, 0]),  # a byte too few
        bytes([0, 4, 0, 0, 0, 0, 0]),  # one too many
        bytes([0, 65, *bytes(65)]),
        bytes([0, 255, *bytes(255)]),
        bytes([61, 4, 0, 0, 0, 0]),  # 65 bits in all
        bytes([64, 0]),
        bytes([255, 0]),
    ],
)
def test_what_nobody_wrote_is_refused(data: bytes) -> None:
    with pytest.raises(PayloadError, match="whole numbers"):
        decode_integers(data, 4)


def test_a_payload_of_another_size_takes_no_memory() -> None:
    data = bytes(64 * 2**20)
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError, match="whole numbers, not 2"):
            decode_integers(data, 100)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**18
