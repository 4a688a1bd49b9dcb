"""What one end writes of states, the other reads."""

import numpy as np
import pytest
import torch

from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.common.tensors import State
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.packing import PayloadError
from slora_flwr.wire.state_channel import (
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
    codec = Codec("int8")
    base = BaseWeights({"m": np.array([0, 7])}, {"m": torch.tensor([1.5, -2.0])})
    reference = {"m.values": torch.tensor([1.5, -2.25])}
    array = write_base(base, codec, reference)
    shapes = {"m.values": (2,)}
    read = read_base(array.data, shapes, base.positions, 0.5, codec, reference)
    # 0 and the largest of a block are exact.
    assert read.values["m"].tolist() == [1.5, -2.0]
    assert read.positions == base.positions
    assert read.scaling == 0.5


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
    updates = read_updates(write_updates([draw(1), draw(2)], ranks), SHAPES, ranks)
    for seed, own, update in zip((1, 2), ranks, updates, strict=True):
        full = draw(seed)
        assert update["m.lora_B"].shape == (4, own or 3)
        assert all(
            t.equal(full[n][tuple(map(slice, t.shape))]) for n, t in update.items()
        )


def test_a_versions_name_is_that_of_its_parts_joined() -> None:
    assert name_version(b"ab", b"c") == name_version(b"abc") != name_version(b"ab")
