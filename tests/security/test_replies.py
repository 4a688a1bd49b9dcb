"""Replies that Flower cannot read, or that grow while it reads them."""

import json
import tracemalloc
from collections.abc import Callable, Iterable

import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MessageType,
    RecordDict,
)
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from slora_flwr.server import collect
from slora_flwr.server.fleet import MOST_UNREADABLE, Fleet
from slora_flwr.wire.inflation import MOST_RECORD_BYTES
from slora_flwr.wire.packing import STYPE
from tests.support.clock import Clock
from tests.support.faults.forged import (
    MEGABYTE,
    Objects,
    body_of,
    empty,
    no_protobuf,
    of_message,
    one_object,
    other_root,
    repeated_chunk,
    with_array,
    with_root,
)
from tests.support.fleet import EXPECTED, SIZES, FakeGrid, gathered
from tests.support.grids import RecordingGrid
from tests.support.runs import Config, differ, elsewhere, events, final, start


def unknown_root(reply: Message) -> Objects:
    return with_root(of_message(reply), one_object("Pickle", b"x"))


def no_header(reply: Message) -> Objects:
    return with_root(of_message(reply), b"\xff\xfe" * 8)


def no_record_dict(reply: Message) -> Objects:
    array = next(iter(reply.content.array_records.values()), ArrayRecord({}))
    nested = get_all_nested_objects(array)
    objects = "", {name: item.deflate() for name, item in nested.items()}
    root = one_object("Message", body_of(reply), [array.object_id])
    return with_root(objects, root)


def forged_reply(reply: Message) -> Objects:
    reply.metadata.__dict__["_reply_to_message_id"] = "1"
    return of_message(reply)


def missing_child(reply: Message) -> Objects:
    return with_root(
        of_message(reply), one_object("Message", body_of(reply), ["0" * 64])
    )


def unprintable_name(reply: Message) -> Objects:
    """Return a reply with a name that JSON can write and UTF-8 cannot."""
    body = json.dumps({"\ud800": "0" * 64}).encode()
    record = one_object("ArrayRecord", body, ["0" * 64])
    array = json.dumps(
        {"dtype": "\ud800", "shape": [2**40], "stype": STYPE, "arraychunk_ids": []}
    ).encode()
    whole = get_object_id(record)
    content = one_object("RecordDict", json.dumps({"x": whole}).encode(), [whole])
    inner = get_object_id(content)
    objects = "", {"0" * 64: one_object("Array", array), whole: record, inner: content}
    return with_root(objects, one_object("Message", body_of(reply), [inner]))


def many_arrays(reply: Message) -> Objects:
    """Return a reply with a megabyte in each of 600 arrays."""
    return with_array(reply, [0], 600)


def array_of_many_names(reply: Message) -> Objects:
    """Return a reply with a megabyte in one array that has 600 names."""
    chunk = one_object("ArrayChunk", bytes(MEGABYTE))
    told = {"dtype": "x", "shape": [1], "stype": STYPE, "arraychunk_ids": [0]}
    array = one_object("Array", json.dumps(told).encode(), [get_object_id(chunk)])
    name = get_object_id(array)
    names = dict.fromkeys(map(str, range(600)), name)
    record = one_object("ArrayRecord", json.dumps(names).encode(), [name])
    return with_record(reply, [chunk, array, record], 1)


def record_of_many_names(reply: Message) -> Objects:
    """Return a reply with a record of a megabyte that has 600 names."""
    content = ConfigRecord({"x": bytes(MEGABYTE)})
    return with_record(reply, [content.deflate()], 600)


def large_record(reply: Message) -> Objects:
    """Return a reply with one record that is too large."""
    content = ConfigRecord({"x": bytes(MOST_RECORD_BYTES)})
    return with_record(reply, [content.deflate()], 1)


def with_record(reply: Message, objects: list[bytes], names: int) -> Objects:
    """Return a reply that names the last of some objects so many times."""
    record = get_object_id(objects[-1])
    told = json.dumps(dict.fromkeys(map(str, range(names)), record)).encode()
    objects.append(one_object("RecordDict", told, [record]))
    root = one_object("Message", body_of(reply), [get_object_id(objects[-1])])
    return with_root(("", {get_object_id(item): item for item in objects}), root)


class InflatingGrid(RecordingGrid):
    """Read the replies of node 2 as Flower does over the network, from objects."""

    def __init__(
        self,
        config: Config,
        forge: Callable[[Message], Objects],
        kind: str = MessageType.TRAIN,
        rounds: Iterable[int] = (2,),
    ) -> None:
        super().__init__(config, nodes=3)
        self._forge, self._kind = forge, kind
        self._when = {str(number) for number in rounds}

    def _answer(self, message: Message) -> Message:
        reply = super()._answer(message)
        facts = message.metadata
        is_meant = facts.dst_node_id == 2 and facts.message_type == self._kind
        if not is_meant or facts.group_id not in self._when:
            return reply
        root, objects = self._forge(reply)
        return inflate_object_from_contents(root, objects)  # type: ignore[return-value]


UNREADABLE: dict[str, tuple[Callable[[Message], Objects], str]] = {
    "no-protobuf": (no_protobuf, "DecodeError: "),
    "other-root": (other_root, "it is of kind RecordDict, not Message"),
    "unknown-root": (unknown_root, "KeyError: 'Pickle'"),
    "no-header": (no_header, "UnicodeDecodeError: "),
    "empty": (empty, "IndexError: "),
    "no-record-dict": (no_record_dict, "MessageInitializationError: "),
    "forged-reply": (forged_reply, "it replies to another message"),
    "missing-child": (missing_child, "KeyError: '000000"),
    "unprintable-name": (unprintable_name, "its reply cannot be read: "),
    "repeated-chunk": (repeated_chunk, "its arrays have 629145600 bytes; allowed: "),
    "many-arrays": (many_arrays, "bytes; allowed: up to "),
    "array-of-many-names": (array_of_many_names, "its arrays have 1048576 bytes"),
    "record-of-many-names": (record_of_many_names, "its records have 6291"),
    "large-record": (large_record, "its records have 83886"),
}


@pytest.mark.parametrize(("forge", "told"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_reply_that_cannot_be_read_is_its_nodes_failure(
    config: Config, forge: Callable[[Message], Objects], told: str
) -> None:
    directory = start(config, InflatingGrid(config, forge))
    [failure] = events(directory, "failure")
    assert (failure["round"], failure["node"]) == (2, 2)
    assert told in failure["reason"]
    assert len(failure["clients"]) == 2
    assert [e["replied"] for e in events(directory, "round")] == [6, 4, 6]


def test_an_evaluation_that_cannot_be_read_is_its_nodes_failure(config: Config) -> None:
    config |= {"clients.holdout": 0.25}
    grid = InflatingGrid(config, no_protobuf, MessageType.EVALUATE)
    directory = start(config, grid)
    [failure] = events(directory, "failure")
    assert (failure["round"], failure["node"]) == (2, 2)
    assert all("client_accuracy" in e for e in events(directory, "round"))


def test_what_flower_writes_is_read(config: Config) -> None:
    directory = start(config, InflatingGrid(config, of_message))
    assert not events(directory, "failure")
    config = elsewhere(config)
    expected = start(config, RecordingGrid(config, nodes=3))
    assert not differ(final(directory), final(expected))


def test_a_node_of_unreadable_replies_is_left_out_for_the_rest_of_the_run(
    config: Config,
) -> None:
    config |= {"rounds": MOST_UNREADABLE + 3}
    rounds = range(2, MOST_UNREADABLE + 3)
    directory = start(config, InflatingGrid(config, no_protobuf, rounds=rounds))
    failed = [failure["round"] for failure in events(directory, "failure")]
    assert failed == list(range(2, MOST_UNREADABLE + 2))
    [left_out] = events(directory, "left_out")
    assert (left_out["node"], left_out["name"]) == (2, "node 2")
    assert "not asked again in this run" in left_out["reason"]
    # Its clients train elsewhere.
    assert [e["replied"] for e in events(directory, "round")][-2:] == [6, 6]


def test_a_description_that_cannot_be_read_leaves_its_node_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(collect, "time", Clock())

    def answer(message: Message) -> Message:
        reply = Message(RecordDict(), reply_to=message)
        return inflate_object_from_contents(*no_protobuf(reply))  # type: ignore[return-value]

    grid = FakeGrid([1, 2])
    grid.broken[2] = answer
    found = Fleet(EXPECTED, 1, 5.0, SIZES)
    found.gather(grid)
    assert found.left_out.keys() == {2}
    assert "cannot be read: DecodeError" in found.left_out[2]
    for _ in range(2 * MOST_UNREADABLE):
        found.forget(2)
        found.refresh(grid)
    assert grid.asked.count(2) == MOST_UNREADABLE


def test_a_connection_that_fails_is_no_nodes_failure(config: Config) -> None:
    class Cut(RecordingGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            raise ConnectionError("the SuperLink is gone")

    with pytest.raises(ConnectionError):
        start(config, Cut(config, nodes=2))


@pytest.mark.parametrize(
    "forge",
    [repeated_chunk, many_arrays, array_of_many_names, record_of_many_names],
)
def test_a_reply_does_not_grow_while_it_is_read(
    forge: Callable[[Message], Objects],
) -> None:
    query = Message(RecordDict(), dst_node_id=1, message_type="query")
    objects: list[Objects] = []

    class Growing(FakeGrid):
        def _answer(self, message: Message) -> Message:
            objects.append(forge(Message(RecordDict(), reply_to=message)))
            tracemalloc.start()
            return inflate_object_from_contents(*objects[0])  # type: ignore[return-value]

    try:
        [(reply, _)] = collect.collect(Growing([1]), [query], 5.0, most=2 * MEGABYTE)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert collect.is_unreadable(reply)
    assert peak < 8 * MEGABYTE


def test_arrays_within_the_bound_are_read() -> None:
    query = Message(RecordDict(), dst_node_id=1, message_type="query")
    sent = Array("float32", (1,), STYPE, bytes(MEGABYTE))

    class Honest(FakeGrid):
        def _answer(self, message: Message) -> Message:
            content = RecordDict({"arrays": ArrayRecord({"x": sent})})
            root, objects = of_message(Message(content, reply_to=message))
            return inflate_object_from_contents(root, objects)  # type: ignore[return-value]

    [(reply, _)] = collect.collect(Honest([1]), [query], 5.0, most=MEGABYTE)
    assert not reply.has_error()


def test_an_error_of_the_superlink_is_not_unreadable() -> None:
    query = Message(RecordDict(), dst_node_id=1, message_type="query")
    error = Error(ErrorCode.NODE_UNAVAILABLE, "gone")
    grid = FakeGrid([1])
    grid.broken[1] = lambda message: Message(error, reply_to=message)
    [(reply, _)] = collect.collect(grid, [query], 5.0)
    assert collect.is_gone(reply)
    assert not collect.is_unreadable(reply)


def with_an_array(reply: Message) -> Objects:
    """Return a reply to which an array of a byte is added."""
    reply.content["more"] = ArrayRecord({"x": Array("float32", (1,), STYPE, b"x")})
    return of_message(reply)


def test_an_evaluation_with_an_array_is_refused(config: Config) -> None:
    config |= {"clients.holdout": 0.25}
    grid = InflatingGrid(config, with_an_array, MessageType.EVALUATE)
    [failure] = events(start(config, grid), "failure")
    assert (failure["round"], failure["node"]) == (2, 2)
    assert "its arrays have 1 bytes; allowed: up to 0" in failure["reason"]


def test_a_description_with_an_array_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(collect, "time", Clock())
    grid, honest = FakeGrid([1, 2]), FakeGrid()

    def answer(message: Message) -> Message:
        reply = honest._answer(message)
        return inflate_object_from_contents(*with_an_array(reply))  # type: ignore[return-value]

    grid.broken[2] = answer
    found = gathered(grid)
    assert found.left_out.keys() == {2}
    assert "its arrays have 1 bytes; allowed: up to 0" in found.left_out[2]
