"""What travels: packed states, message contents, and the ledger."""

import math
import struct

import pytest
import torch
from flwr.app import Array, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from slora_flwr.wire.messages import (
    BaseDelta,
    Instruction,
    MessageError,
    Report,
    message_bytes,
)
from slora_flwr.wire.packing import STYPE, PayloadError, pack, unpack

SHAPES = st.dictionaries(
    st.text(max_size=5),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    max_size=5,
)
KNOWN = {"a": torch.tensor([[1.0, -2.0]]), "b": torch.tensor(0.5)}
KNOWN_BYTES = b"\x00\x00\x80\x3f\x00\x00\x00\xc0\x00\x00\x00\x3f"
KNOWN_SHAPES = {"a": (1, 2), "b": ()}


def array(data: bytes, **changes: object) -> Array:
    facts: dict[str, object] = {"dtype": "float32", "stype": STYPE}
    facts |= {"shape": (len(data) // 4,)} | changes
    return Array(data=data, **facts)  # type: ignore[call-overload]


@pytest.fixture(autouse=True)
def _identity() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 0


def message(content: RecordDict) -> Message:
    return Message(content, dst_node_id=7, message_type="train", group_id="3")


def travel(content: RecordDict) -> RecordDict:
    """Through a serialised message, as between two processes."""
    proto = message_to_proto(message(content))
    arrived = type(proto).FromString(proto.SerializeToString())
    return message_from_proto(arrived).content


@settings(max_examples=60)
@given(shapes=SHAPES, data=st.data())
def test_any_state_comes_back_bit_for_bit(
    shapes: dict[str, tuple[int, ...]], data: st.DataObject
) -> None:
    state = {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        values = data.draw(
            st.lists(st.floats(width=32, allow_nan=False), min_size=size, max_size=size)
        )
        state[name] = torch.tensor(values, dtype=torch.float32).reshape(shape)
    back = unpack(pack(state), shapes)
    assert list(back) == list(state)
    for name, tensor in state.items():
        assert back[name].shape == tensor.shape
        assert back[name].numpy().tobytes() == tensor.numpy().tobytes()


def test_a_known_state_has_these_bytes() -> None:
    packed = pack(KNOWN)
    assert packed.data == KNOWN_BYTES
    assert packed.data == struct.pack("<3f", 1.0, -2.0, 0.5)
    assert (packed.dtype, packed.shape, packed.stype) == ("float32", (3,), STYPE)


def test_known_bytes_are_this_state() -> None:
    state = unpack(array(KNOWN_BYTES), KNOWN_SHAPES)
    assert state["a"].tolist() == [[1.0, -2.0]]
    assert state["b"].item() == 0.5
    assert state["b"].shape == ()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_other_types_travel_as_float32(dtype: torch.dtype) -> None:
    packed = pack({"x": torch.tensor([3, -4]).to(dtype)})
    assert packed.data == struct.pack("<2f", 3.0, -4.0)


def test_strided_tensors_travel_in_row_major_order() -> None:
    packed = pack({"x": torch.arange(4.0).view(2, 2).T})
    assert packed.data == struct.pack("<4f", 0.0, 2.0, 1.0, 3.0)


def test_what_is_unpacked_can_be_written_to() -> None:
    given = array(KNOWN_BYTES)
    unpack(given, KNOWN_SHAPES)["a"].add_(1.0)
    assert given.data == KNOWN_BYTES


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (array(KNOWN_BYTES, stype="numpy.ndarray"), "is numpy.ndarray of float32"),
        (array(KNOWN_BYTES, dtype="float64"), f"is {STYPE} of float64"),
        (array(KNOWN_BYTES[:-4]), r"with shape \(2,\), not .* with \(3,\)"),
        (array(KNOWN_BYTES + bytes(4)), r"with shape \(4,\)"),
        (array(KNOWN_BYTES[:-1], shape=(3,)), "has 11 bytes, not 12"),
        (array(KNOWN_BYTES, shape=(2,)), r"with shape \(2,\)"),
        (array(KNOWN_BYTES, shape=(1, 3)), r"with shape \(1, 3\)"),
        (array(b""), r"with shape \(0,\)"),
    ],
    ids=["stype", "dtype", "short", "long", "truncated", "shape", "rank", "empty"],
)
def test_another_array_is_refused(given: Array, told: str) -> None:
    with pytest.raises(PayloadError, match=told):
        unpack(given, KNOWN_SHAPES)


def packed(*values: float) -> Array:
    return pack({"values": torch.tensor(values)})


DIGEST, OTHER = "0123456789abcdef" * 2, "fedcba9876543210" * 2


@pytest.mark.parametrize(
    "delta",
    [
        BaseDelta(),
        BaseDelta(DIGEST),
        BaseDelta(DIGEST, 0, packed(9.0), [packed(1.0), packed(2.0, 3.0)]),
        BaseDelta(OTHER, 7, None, [packed(4.0)]),
        BaseDelta(weights=packed(5.0)),
    ],
)
@pytest.mark.parametrize("base", ["", DIGEST])
def test_an_instruction_arrives_as_it_was_sent(base: str, delta: BaseDelta) -> None:
    sent = Instruction(3, 1, [4, 0, 17], DIGEST, pack(KNOWN), base, phase_round=2)
    sent.base_delta, sent.since = delta, base
    got = Instruction.read(travel(sent.content()))
    assert (got.server_round, got.phase, got.clients) == (3, 1, [4, 0, 17])
    assert (got.fingerprint, got.base, got.phase_round) == (DIGEST, base, 2)
    assert (got.state.data, got.since) == (KNOWN_BYTES, base)
    came = got.base_delta
    assert (came.known, came.version) == (delta.known, delta.version)
    assert [c.data for c in came.changes] == [c.data for c in delta.changes]
    for name in ("start", "weights"):
        there, here = getattr(came, name), getattr(delta, name)
        assert (there and there.data) == (here and here.data)


def report() -> Report:
    return Report(
        server_round=3,
        phase=1,
        fingerprint="f00d",
        update=pack(KNOWN),
        clients=[4, 17],
        examples=[10, 30],
        losses=[0.5, 0.25],
        seconds=[1.5, 2.5],
        payloads=[12, 9],
    )


@pytest.mark.parametrize("failures", [{}, {0: "no examples", 5: "not finite"}])
def test_a_report_arrives_as_it_was_sent(failures: dict[int, str]) -> None:
    sent = report()
    sent.failures, sent.wire = failures, [7, 9] if failures else []
    content = travel(sent.content())
    got = Report.read(content)
    assert (got.server_round, got.phase, got.fingerprint) == (3, 1, "f00d")
    assert (got.clients, got.examples) == ([4, 17], [10, 30])
    assert (got.losses, got.seconds) == ([0.5, 0.25], [1.5, 2.5])
    assert got.payloads == [12, 9]
    assert (got.failures, got.wire) == (failures, sent.wire)
    assert got.update.data == KNOWN_BYTES
    assert content.metric_records["metrics"]["num-examples"] == 40


@pytest.mark.parametrize("record", ["arrays", "metrics", "config"])
def test_a_missing_record_is_an_error(record: str) -> None:
    content = report().content()
    del content[record]
    with pytest.raises(MessageError, match=record):
        Report.read(content)


@pytest.mark.parametrize(
    ("record", "entry"),
    [
        ("arrays", "update"),
        ("metrics", "clients"),
        ("metrics", "examples"),
        ("metrics", "losses"),
        ("metrics", "seconds"),
        ("metrics", "payloads"),
        ("config", "server-round"),
        ("config", "phase"),
        ("config", "fingerprint"),
    ],
)
def test_a_missing_entry_is_an_error(record: str, entry: str) -> None:
    content = report().content()
    del content[record][entry]
    with pytest.raises(MessageError, match=entry):
        Report.read(content)


def test_a_number_in_place_of_a_list_is_an_error() -> None:
    content = report().content()
    content.metric_records["metrics"]["clients"] = 4
    with pytest.raises(MessageError):
        Report.read(content)


def test_failures_without_reasons_are_an_error() -> None:
    sent = report()
    sent.failures = {0: "no examples"}
    content = sent.content()
    content.config_records["config"]["reasons"] = ["one", "too many"]
    with pytest.raises(MessageError):
        Report.read(content)


def test_a_round_that_is_no_number_is_an_error() -> None:
    content = report().content()
    content.config_records["config"]["server-round"] = "three"
    with pytest.raises(MessageError):
        Report.read(content)


def test_message_bytes_are_those_of_the_serialised_message() -> None:
    sent = message(Instruction(3, 1, [4], "f00d", pack(KNOWN)).content())
    longer = message(Instruction(3, 1, [4], "f00d", pack({}), "digest").content())
    for one in (sent, longer):
        assert message_bytes(one) == len(message_to_proto(one).SerializeToString())


def test_message_bytes_grow_with_the_payload() -> None:
    sizes = [
        message_bytes(message(Instruction(3, 1, [4], "f", pack(s)).content()))
        for s in ({"x": torch.zeros(1000)}, {"x": torch.zeros(2000)})
    ]
    assert 4000 <= sizes[1] - sizes[0] <= 4010
