"""Coded states: error bounds, sizes, rounding, and payloads that are broken."""

import math
import zlib

import numpy as np
import pytest
import torch
from flwr.app import Array
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from slora_flwr.wire.codec import Codec
from slora_flwr.wire.frame import unwrap, wrap
from slora_flwr.wire.packing import PayloadError, pack
from slora_flwr.wire.positions import decode_positions, encode_positions, entropy_bound
from slora_flwr.wire.quantize import codes_size, dequantize, quantize, scales_size

DTYPES = ("float32", "float16", "bfloat16", "int8", "int4")
LEVELS = {"int8": 127, "int4": 7}
Values = NDArray[np.float32]
Positions = NDArray[np.int64]

# Any finite float32, and vectors that are mostly of one magnitude, as updates are.
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
SMALL = st.floats(-(2.0**-7), 2.0**-7, width=32)
VECTORS = st.one_of(st.lists(FLOATS, max_size=300), st.lists(SMALL, max_size=300)).map(
    lambda v: np.array(v, dtype=np.float32)
)


def philox(key: int = 1) -> np.random.Philox:
    return np.random.Philox(key=key)


def bound(values: Values, dtype: str, stochastic: bool) -> NDArray[np.float64]:
    """What the coder promises of |decoded - value|, in float64, by its definition."""
    magnitude = np.abs(values.astype(np.float64))
    if dtype == "float32":
        return np.zeros_like(magnitude)
    if dtype in LEVELS:
        # A step: the largest of the value's block of 128 over 127 or 7.
        starts = [i - i % 128 for i in range(len(values))]
        peak = np.array([magnitude[s : s + 128].max() for s in starts])
        step = peak / LEVELS[dtype]
        # Float32's own rounding of scale and product, and blocks too small for a scale.
        slack = 3e-7 * peak + 1.3e-35
    else:
        # A step at the value's power of two; what overflows becomes the largest.
        digits, lowest, largest = (
            (10, -14, 65504.0)
            if dtype == "float16"
            else (7, -126, float(2**127 * (2 - 2**-7)))
        )
        exponent = np.frexp(magnitude)[1] - 1
        step = np.ldexp(1.0, np.maximum(exponent, lowest) - digits)
        slack = np.maximum(magnitude - largest, 0.0)
    return (step if stochastic else step / 2) + slack


@settings(max_examples=150)
@given(values=VECTORS, stochastic=st.booleans(), key=st.integers(0, 2**64))
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_read_is_within_the_bound(
    dtype: str, values: Values, stochastic: bool, key: int
) -> None:
    codes, scales = quantize(values, dtype, philox(key) if stochastic else None)
    assert len(codes) == codes_size(len(values), dtype)
    assert len(scales) == scales_size(len(values), dtype)
    read = dequantize(codes, scales, len(values), dtype)
    assert read.shape == values.shape
    assert np.isfinite(read).all()
    error = np.abs(read.astype(np.float64) - values)
    assert (error <= bound(values, dtype, stochastic)).all()


def test_known_codes() -> None:
    """By hand: the scale is 2.54 / 127 = 0.02, and -1 / 0.02 = -50."""
    values = np.array([2.54, -1.0, 0.031], dtype=np.float32)
    codes, scales = quantize(values, "int8")
    assert np.frombuffer(codes, np.int8).tolist() == [127, -50, 2]
    assert np.frombuffer(scales, "<f4").tolist() == pytest.approx([0.02])
    # 2.54 / 7 = 0.362857: 7, -2.76 and 0.09, so 15, 5 and 8 with 8 added.
    codes, scales = quantize(values, "int4")
    assert codes == bytes([15 | 5 << 4, 8 | 8 << 4])
    # 1.0 + 2^-9 has one bit more than bfloat16; to the nearest even it is 1.0.
    codes, _ = quantize(np.array([1.0 + 2**-9, -3.0], dtype=np.float32), "bfloat16")
    assert np.frombuffer(codes, "<u2").tolist() == [0x3F80, 0xC040]


def test_overflow_is_the_largest_number() -> None:
    largest = np.finfo(np.float32).max
    values = np.array([largest, -largest, 7e4], dtype=np.float32)
    read = dequantize(*quantize(values, "float16"), 3, "float16")
    assert read.tolist() == [65504.0, -65504.0, 65504.0]
    for stream in (None, philox()):
        codes, scales = quantize(values, "bfloat16", stream)
        assert np.isfinite(dequantize(codes, scales, 3, "bfloat16")).all()


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_stochastic_rounding_is_unbiased(dtype: str) -> None:
    """The mean over 4,000 draws is within 5 standard errors of each value."""
    # Halves, thirds, tiny ones, both signs; the first sets the block's scale.
    values = np.array([1.0, 0.5011, -1 / 3, 0.0137, -7e-6, 3.1e-7, 0.9999, -0.25])
    values = values.astype(np.float32)
    draws = 4000
    read = np.stack(
        [
            dequantize(*quantize(values, dtype, philox(k)), len(values), dtype)
            for k in range(draws)
        ]
    ).astype(np.float64)
    # Of a value between two codes the variance is at most a quarter of the step's
    # square, and a mean of codes that hardly ever differ says less than one draw.
    step = bound(values, dtype, stochastic=True)
    error = np.sqrt(read.var(axis=0) / draws) + step / draws
    assert (np.abs(read.mean(axis=0) - values) < 5 * error).all()
    # Not the nearest: some value between codes is read both ways.
    assert (read.std(axis=0) > 0).any()


def test_rounding_follows_from_its_key() -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    first = quantize(values, "int8", philox(3))
    assert quantize(values, "int8", philox(3)) == first
    assert quantize(values, "int8", philox(4)) != first


# Positions


@settings(max_examples=200)
@given(data=st.data(), size=st.integers(1, 100_000))
def test_positions_come_back(data: st.DataObject, size: int) -> None:
    chosen = data.draw(st.sets(st.integers(0, size - 1), max_size=60))
    positions = np.array(sorted(chosen), dtype=np.int64)
    read = decode_positions(encode_positions(positions, size), len(positions), size)
    assert read.tolist() == positions.tolist()


@pytest.mark.parametrize("share", [0.5, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001])
def test_positions_take_what_they_carry(share: float) -> None:
    size = max(1_000_000, round(20_000 / share))
    count = round(share * size)
    random = np.random.default_rng(1)
    positions = np.sort(random.choice(size, count, replace=False))
    found = len(encode_positions(positions, size))

    # log2 of size over count by Stirling's series, to a part in a million.
    def stirling(n: float) -> float:
        return n * math.log(n) - n + 0.5 * math.log(2 * math.pi * n)

    bits = (stirling(size) - stirling(count) - stirling(size - count)) / math.log(2)
    assert entropy_bound(count, size) == pytest.approx(bits / 8, rel=1e-6)
    assert bits / 8 <= found <= 1.02 * bits / 8


def test_the_last_step_takes_what_the_codes_carry() -> None:
    """int8 codes of Gaussian values: 6% off, 2% above their own entropy at most."""
    values = np.random.default_rng(2).standard_normal(1 << 18).astype(np.float32)
    codes, _ = quantize(values, "int8", philox())
    counts = np.bincount(np.frombuffer(codes, np.uint8), minlength=256)
    shares = counts[counts > 0] / counts.sum()
    entropy = -(shares * np.log2(shares)).sum() / 8 * len(codes)
    assert entropy <= len(wrap(codes, 1, compress=True)) <= 1.02 * entropy


# Frames


@settings(max_examples=150)
@given(
    data=st.binary(max_size=400),
    repeat=st.integers(1, 20),
    itemsize=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
def test_a_frame_is_lossless(
    data: bytes, repeat: int, itemsize: int, seed: int
) -> None:
    data *= repeat
    for known in (b"", np.random.default_rng(seed).bytes(len(data)), data):
        for compress in (False, True):
            frame = wrap(data, itemsize, compress=compress, known=known)
            assert unwrap(frame, itemsize, len(data), known) == data
            assert len(frame) <= len(data) + 13  # it never grows by more


def test_a_difference_is_small_where_little_changed() -> None:
    before = np.random.default_rng(0).standard_normal(50_000).astype(np.float32)
    after = before.copy()
    after[::50] += 1e-3
    whole = wrap(after.tobytes(), 4, compress=True)
    change = wrap(after.tobytes(), 4, compress=True, known=before.tobytes())
    assert len(change) < 0.1 * len(whole)


def test_a_difference_to_something_else_is_noticed() -> None:
    before, after = bytes(1000), bytes(999) + b"\x01"
    frame = wrap(after, 1, compress=True, known=before)
    with pytest.raises(PayloadError, match="its checksum does not match"):
        unwrap(frame, 1, 1000, b"\x01" * 1000)
    with pytest.raises(PayloadError, match="difference from bytes that are not known"):
        unwrap(frame, 1, 1000)


# States


def make_state(values: Values) -> dict[str, torch.Tensor]:
    """Two tensors of an adapter and one of the head."""
    tensor = torch.from_numpy(values)
    cut = len(values) // 2
    return {"a": tensor[:cut], "b": tensor[cut:-1].view(1, -1), "head": tensor[-1:]}


CODECS = [
    Codec(dtype, share, lossless, head=1)
    for dtype in DTYPES
    for share in (0.0, 0.1)
    for lossless in (False, True)
]


def encode(codec: Codec, state: dict[str, torch.Tensor]) -> tuple[Array, Positions]:
    """Code a state with a random choice of its adapter's values and the head's one."""
    size = sum(tensor.numel() for tensor in state.values())
    count, _ = codec.parts(size)
    chosen = np.random.default_rng(count).choice(size - 1, count, replace=False)
    chosen = np.append(np.sort(chosen), size - 1)
    return codec.encode(state, chosen if codec.share else None, philox()), chosen


@settings(max_examples=30)
@given(values=VECTORS.filter(lambda v: len(v) > 3))
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_states_come_back_within_the_bound(codec: Codec, values: Values) -> None:
    state = make_state(values)
    array, chosen = encode(codec, state)
    read = codec.decode(array, {name: t.shape for name, t in state.items()})
    assert [(n, t.shape) for n, t in read.items()] == [
        (n, t.shape) for n, t in state.items()
    ]
    flat = torch.cat([tensor.reshape(-1) for tensor in read.values()]).numpy()
    error = np.abs(flat.astype(np.float64) - values)[chosen]
    # The head's value has a block of its own.
    for part in (chosen[:-1], chosen[-1:]):
        of_part = np.isin(chosen, part)
        limit = bound(values[part], codec.dtype, stochastic=True)
        assert (error[of_part] <= limit).all()
    assert not np.delete(flat, chosen).any()  # what did not travel is zero


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_size_is_known_before(codec: Codec) -> None:
    values = np.random.default_rng(3).standard_normal(40_000).astype(np.float32)
    array, _ = encode(codec, make_state(values))
    size = codec.size(len(values))
    if codec.lossless:
        assert 0.75 * size < len(array.data) <= 1.02 * size
    elif codec.share:  # the bound of the positions' entropy, and their coder
        assert size <= len(array.data) <= 1.02 * size
    else:
        assert len(array.data) == size


def test_sizes_by_hand() -> None:
    """A frame of 13 bytes, codes, and a scale of 4 bytes for each 128 values."""
    assert Codec(head=24).size(1024) == 4 * 1024
    # The head's 24 values have a scale of their own.
    assert Codec("int8", head=24).size(1024) == 13 + 1024 + 4 * (8 + 1)
    assert Codec("int4", head=25).size(1025) == 13 + 500 + 13 + 4 * (8 + 1)
    assert Codec("bfloat16").size(10) == 13 + 20
    # 10% of 20 and of 5, rounded up: 2 and 1. 25 over 3 is 2300, 12 bits: 2 bytes.
    assert Codec("float32", 0.1, head=5).size(25) == 13 + 3 * 4 + 2


@settings(max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("codec", [c for c in CODECS if not c.is_plain], ids=str)
def test_a_broken_payload_is_an_error(codec: Codec, data: st.DataObject) -> None:
    """Cut off, with other bits, or with more bytes: never another state."""
    values = np.random.default_rng(5).standard_normal(300).astype(np.float32)
    state = make_state(values)
    array, _ = encode(codec, state)
    good = array.data
    way = data.draw(st.sampled_from(["cut", "flip", "add", "any"]))
    if way == "cut":
        broken = good[: data.draw(st.integers(0, len(good) - 1))]
    elif way == "flip":
        at = data.draw(st.integers(0, len(good) - 1))
        changed = good[at] ^ data.draw(st.integers(1, 255))
        broken = good[:at] + bytes([changed]) + good[at + 1 :]
    elif way == "add":
        broken = good + data.draw(st.binary(min_size=1, max_size=20))
    else:
        broken = data.draw(st.binary(max_size=80))
    array.data = broken
    with pytest.raises(PayloadError):
        codec.decode(array, {name: t.shape for name, t in state.items()})


def test_broken_contents_of_a_whole_frame_are_an_error() -> None:
    """Behind a right checksum: too few values, positions that are none."""
    codec, shapes = Codec("int8", 0.3), {"x": (10,)}

    def read(contents: bytes) -> None:
        frame = wrap(contents, 1, compress=False)
        codec.decode(Array("int8", (10,), "slora.coded", frame), shapes)

    positions = encode_positions(np.array([0, 3, 9]), 10)
    read(bytes(3 + 4) + positions)
    far = encode_positions(np.array([0, 3, 11]), 12)
    for contents, told in (
        (b"", "0 bytes of values, not 7"),
        (bytes(6), "6 bytes of values, not 7"),
        (bytes(7), "exceed 70 bytes"),
        (bytes(7) + far, "a position is 11; allowed: below 10"),
        (bytes(7) + positions + b"x", "after the positions"),
        (bytes(7) + encode_positions(np.array([1, 2]), 10), "are not 3"),
        (bytes(7) + positions[:-1], "cut off|cannot be read"),
    ):
        with pytest.raises(PayloadError, match=told):
            read(contents)


def test_a_small_payload_cannot_ask_for_much_memory() -> None:
    codec, shapes = Codec("int8", lossless=True), {"x": (10,)}
    bomb = wrap(bytes(1 << 20), 1, compress=True)
    assert len(bomb) < 1000
    array = Array("int8", (10,), "slora.coded", bomb)
    with pytest.raises(PayloadError, match="bytes; allowed: up to 27"):
        codec.decode(array, shapes)
    with pytest.raises(PayloadError, match="holds 1048576 bytes; allowed: up to 14"):
        unwrap(bomb, 1, 14)
    # A length that is a lie.
    lie = bomb[:1] + (14).to_bytes(8, "little") + bomb[9:]
    with pytest.raises(PayloadError, match="cannot be expanded"):
        unwrap(lie, 1, 14)
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    many = coder.compress(bytes(1 << 20)) + coder.flush()
    with pytest.raises(PayloadError, match="exceed 70 bytes"):
        decode_positions(len(many).to_bytes(4, "little") + many, 3, 10)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dtype": "int4"}, "is slora.coded of int4"),
        ({"stype": "slora.packed"}, "is slora.packed of int8"),
        ({"shape": (9,)}, r"with shape \(9,\)"),
    ],
)
def test_another_array_is_refused(changes: dict[str, object], told: str) -> None:
    codec = Codec("int8")
    array = codec.encode({"x": torch.zeros(10)})
    for name, value in changes.items():
        setattr(array, name, value)
    with pytest.raises(PayloadError, match=told):
        codec.decode(array, {"x": (10,)})


def test_plain_states_are_the_packed_ones() -> None:
    state = make_state(np.arange(7, dtype=np.float32))
    assert Codec().encode(state) == pack(state)
