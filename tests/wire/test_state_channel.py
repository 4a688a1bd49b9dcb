"""What one end writes of states, the other reads."""

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array

from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.common.tensors import State
from slora_flwr.config import DownloadConfig
from slora_flwr.wire.base_codec import BaseCodec
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.packing import PayloadError, join
from slora_flwr.wire.state_channel import (
    cut,
    name_version,
    read_base,
    read_change,
    read_slices,
    read_state,
    read_sums,
    read_update,
    read_updates,
    read_weights,
    write_base,
    write_change,
    write_slices,
    write_state,
    write_sums,
    write_update,
    write_updates,
    write_weights,
)

SHAPES = {"m.lora_A": (3, 5), "m.lora_B": (4, 3), "head": (2,)}
CODECS = [
    Codec(d, lossless=z, head=2) for d in ("float32", "int8") for z in (False, True)
]


def draw(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(one[n].equal(other[n]) for n in one)


def sent(state: State, rank: int) -> State:
    """Set to zero what a client of a smaller rank is not sent."""
    cut = {name: tensor.clone() for name, tensor in state.items()}
    cut["m.lora_A"][rank:] = 0
    cut["m.lora_B"][:, rank:] = 0
    return cut


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_node_reads_the_state_that_the_server_goes_on_from(codec: Codec) -> None:
    reference = {} if codec.is_exact else {"m.lora_A": draw(1)["m.lora_A"]}
    known = b""
    for seed in (2, 3):
        data, read = write_state(draw(seed), codec, reference)
        array = codec.seal(data, 29, known)
        if codec.is_plain:
            array = codec.encode(draw(seed))
        state, version = read_state(array, SHAPES, codec, reference, known)
        assert equal(state, read)
        assert equal(state, draw(seed)) == codec.is_exact
        assert version == (data if codec.lossless else b"")
        known = version


def test_a_difference_from_another_version_is_refused() -> None:
    codec = Codec(lossless=True)
    known, _ = write_state({"x": torch.zeros(1000)}, codec, {})
    data, _ = write_state({"x": torch.full((1000,), 1e-9)}, codec, {})
    array = codec.seal(data, 1000, known)
    other, _ = write_state({"x": torch.ones(1000)}, codec, {})
    with pytest.raises(PayloadError, match="checksum"):
        read_state(array, {"x": (1000,)}, codec, {}, other)


def test_slices_reach_as_far_as_the_rank() -> None:
    array = write_slices(draw(1), 2)
    assert len(array.data) == 4 * (2 * 5 + 4 * 2 + 2)
    assert equal(read_slices(array, SHAPES, 2), sent(draw(1), 2))


def test_a_base_is_sent_by_its_differences_from_what_is_known() -> None:
    codec = BaseCodec.of(DownloadConfig(dtype="int8"))
    base = BaseWeights({"m": np.array([0, 7])}, {"m": torch.tensor([1.5, -2.0])})
    reference = {"m.values": torch.tensor([1.5, -2.25])}
    array = write_base(base, codec, reference)
    shapes = {"m.values": (2,)}
    read = read_base(array.data, shapes, base.positions, 0.5, codec, reference)
    # 0 and the largest of a block are exact.
    assert read.values["m"].tolist() == [1.5, -2.0]
    assert read.positions == base.positions
    assert read.scaling == 0.5


def some_base(count: int = 3000) -> tuple[BaseWeights, State]:
    """Return a base that gives up factors, and what its values were at first."""
    drawn = torch.Generator().manual_seed(0)
    first = torch.randn(count, generator=drawn)
    values = first + 1e-4 * torch.randn(count, generator=drawn)
    a, b = torch.randn(4, 40, generator=drawn), torch.randn(30, 4, generator=drawn)
    base = BaseWeights({"m": np.arange(count)}, {"m": values}, {"m": a}, {"m": b}, 2.0)
    return base, {"m.values": first}


BASE_SHAPES = {"m.values": (3000,), "m.a": (4, 40), "m.b": (30, 4)}


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_of_a_base_only_the_factors_it_gives_up_are_rounded(
    dtype: str, lossless: bool
) -> None:
    codec = BaseCodec.of(DownloadConfig(base_dtype=dtype, lossless=lossless))
    base, first = some_base()
    data = write_base(base, codec, first).data
    read = read_base(data, BASE_SHAPES, base.positions, 2.0, codec, first)
    assert read.values["m"].equal(base.values["m"])
    rounded = Codec(dtype)
    for name, given, found in (("a", base.a, read.a), ("b", base.b, read.b)):
        assert given["m"].equal(found["m"]) == (dtype == "float32")
        if dtype != "int8":  # whose blocks reach over both factors
            alone = {name: given["m"]}
            shapes = {name: given["m"].shape}
            assert found["m"].equal(rounded.decode(rounded.encode(alone), shapes)[name])
    # A step is at most a 127th of the largest value; rounding is to the nearest.
    errors = [(base.a["m"] - read.a["m"]).abs(), (base.b["m"] - read.b["m"]).abs()]
    largest = max(float(base.a["m"].abs().max()), float(base.b["m"].abs().max()))
    assert max(float(error.max()) for error in errors) <= largest / 127


def test_bytes_of_a_base_by_hand() -> None:
    base, first = some_base()
    codec = BaseCodec.of(DownloadConfig())
    # Two lengths; values; a frame's header, 280 codes and 3 scales.
    size = 2 * 8 + 4 * 3000 + 13 + (160 + 120) + 3 * 4
    assert len(write_base(base, codec, {}).data) == codec.size(BASE_SHAPES) == size
    assert codec.size({}) == 0
    # Differences from what is known have zeros in their high bytes.
    small = BaseCodec.of(DownloadConfig(lossless=True))
    apart = len(write_base(base, small, {}).data)
    assert len(write_base(base, small, first).data) < 0.75 * apart < 0.75 * size


def test_a_frozen_factor_that_no_base_gives_up_is_a_value() -> None:
    codec = BaseCodec.of(DownloadConfig())
    base = BaseWeights(a={"m": torch.randn(4, 40)})
    array = write_base(base, codec, {})
    read = read_base(array.data, {"m.a": (4, 40)}, {}, 1.0, codec, {})
    assert read.a["m"].equal(base.a["m"])


@pytest.mark.parametrize("lossless", [False, True])
def test_a_damaged_base_is_refused(lossless: bool) -> None:
    codec = BaseCodec.of(DownloadConfig(lossless=lossless))
    base, first = some_base()
    data = write_base(base, codec, first).data
    for spoilt in (b"", data[:-1], data + b"\0", data[:7], b"\xff" * 16, data[8:]):
        with pytest.raises(PayloadError):
            read_base(spoilt, BASE_SHAPES, base.positions, 2.0, codec, first)


def test_changes_and_weights_of_a_base() -> None:
    change = {"m.b": torch.randn(4, 6), "m.a": torch.randn(6, 5)}

    def layout(values: int) -> dict[str, torch.Size]:
        rank = values // 9
        return {"m.b": torch.Size([4, rank]), "m.a": torch.Size([rank, 5])}

    assert equal(read_change(write_change(change), layout), change)
    weights = {"m": torch.randn(4, 5)}
    read = read_weights(write_weights(weights), {"m": (4, 5)})
    assert equal(read.weights, weights)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_node_knows_what_the_server_reads_of_an_update(
    rank: int | None, share: float
) -> None:
    codec = Codec("int8", share, head=2)
    upload = write_update(
        draw(1),
        codec,
        residual={},
        start={},
        importance="magnitude",
        stream=np.random.Philox(key=1),
        rank=rank,
    )
    read = read_update(upload.array, SHAPES, codec, rank)
    whole = sent(draw(1), 3 if rank is None else rank)
    for name, tensor in read.items():
        inside = tuple(map(slice, tensor.shape))
        assert upload.update[name][inside].equal(tensor)
        assert upload.update[name].count_nonzero() == tensor.count_nonzero()
        lost = whole[name][inside] - tensor
        assert upload.residual[name].equal(lost)
        assert upload.update[name].shape == SHAPES[name]


@pytest.mark.parametrize("rank", [None, 2])
def test_sums_and_updates_of_several_clients(rank: int | None) -> None:
    reach = 3 if rank is None else rank
    sums = {n: (t * 2**30).long() for n, t in sent(draw(1), reach).items()}
    read = read_sums(write_sums(sums, rank), SHAPES, rank)
    assert all(t.equal(sums[n][tuple(map(slice, t.shape))]) for n, t in read.items())
    assert read["m.lora_A"].shape == (reach, 5)

    ranks = [None, None] if rank is None else [rank, 1]
    codec = Codec()
    arrays = [codec.encode(cut(draw(s), r)) for s, r in zip((1, 2), ranks, strict=True)]
    updates = [*read_updates(write_updates(arrays), SHAPES, codec, ranks)]
    for seed, own, update in zip((1, 2), ranks, updates, strict=True):
        full = draw(seed)
        assert update["m.lora_B"].shape == (4, own or 3)
        assert all(
            t.equal(full[n][tuple(map(slice, t.shape))]) for n, t in update.items()
        )


def test_sums_take_what_their_magnitudes_need() -> None:
    """By hand: values of 5 bits, with a sign 6, in blocks of 128, and a shift of 3."""
    sums = {"x": torch.full((100, 10), 8 * 31), "y": -torch.full((24,), 8 * 31)}
    array = write_sums(sums)
    assert len(array.data) == 1 + 8 + 1024 * 6 // 8
    shapes = {"x": (100, 10), "y": (24,)}
    assert equal(read_sums(array, shapes), sums)


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "float32"}, {"stype": "slora.packed"}, {"shape": (28,)}],
    ids=lambda change: next(iter(change)),
)
def test_only_sums_are_read_as_sums(changes: dict[str, Any]) -> None:
    sums = {name: tensor.long() for name, tensor in draw(1).items()}
    good = write_sums(sums)
    given = {"dtype": good.dtype, "shape": good.shape, "stype": good.stype}
    array = Array(**(given | changes), data=good.data)
    with pytest.raises(PayloadError):
        read_sums(array, SHAPES)


def test_updates_of_another_number_or_size_are_refused() -> None:
    codec = Codec("int8", head=2)
    whole = [codec.encode(draw(1)), codec.encode(draw(2))]
    good = write_updates(whole)
    assert len([*read_updates(good, SHAPES, codec, [None] * 2)]) == 2
    one = Array("int8", (2,), good.stype, join([whole[0].data]))
    longer = Array("int8", (2,), good.stype, join([whole[0].data * 2, b""]))
    for array, count in ((good, 3), (one, 2), (longer, 2), (whole[0], 2)):
        with pytest.raises(PayloadError):
            [*read_updates(array, SHAPES, codec, [None] * count)]


def test_a_versions_name_is_that_of_its_parts_joined() -> None:
    assert name_version(b"ab", b"c") == name_version(b"abc") != name_version(b"ab")
