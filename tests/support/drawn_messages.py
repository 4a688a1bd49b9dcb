"""Drawn messages as they come from the network: objects, their tree, and its bytes."""

import json
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from flwr.app import Message, MessageType, RecordDict
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from hypothesis import strategies as st

from tests.support.drawn import Draw, mutate, some_bytes, texts
from tests.support.faults.forged import Objects, of_message, one_object
from tests.support.objects import Link

ASKED, NODE = "a" * 64, 2
KINDS = ("Array", "ArrayChunk", "ArrayRecord", "ConfigRecord", "Message", "RecordDict")
WAYS = ("body", "json", "json", "bytes", "kind", "children", "other")
OTHER_KINDS = ("MetricRecord", "Pickle", "", "InflatableObject")

# Values in the JSON of an object, as they are written.
json_values = st.one_of(
    st.lists(st.integers(-3, 3), max_size=4).map(json.dumps),
    st.sampled_from(
        [
            *("[-1]", "[5]", "[9223372036854775808]", f"[{10**30}]", "[1e308]"),
            *("[1e999]", "[NaN]", "[null]", '["0"]', "[[0]]", "{}", "null", "true"),
            *("[" * 5000, '{"":' * 5000, "1" * 5000, f"[{'1' * 5000}]", '"\\ud800"'),
            *(f"[{'[],' * 10**5}[]]", "[1099511627776, 1099511627776]", "-1", "1.5"),
        ]
    ),
)
numbers = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([2**31 - 1, -(2**63), 2**63 - 1, 2404, 2405, 2406]),
)


class LinkedGrid(HttpGrid):
    """Flower's grid, of one node, on a SuperLink whose answers are given."""

    def __init__(self, link: Link) -> None:
        super().__init__(token="x")
        self._client = link  # type: ignore[assignment]
        self.set_run(Run.create_empty(1))

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=NODE, last_activated_at="now")]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = ASKED
        return [ASKED]


def message_of(content: RecordDict) -> Message:
    """Return a reply with some content, the same one each time."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 0
    asked = Message(RecordDict(), dst_node_id=NODE, message_type=MessageType.TRAIN)
    asked.metadata.__dict__["_message_id"] = ASKED
    reply = Message(content, reply_to=asked)
    reply.metadata.__dict__ |= {"_created_at": 1.0, "_ttl": 1.0}
    return reply


def some_link(draw: Draw, content: RecordDict) -> Link:
    """Return a SuperLink with a reply of some content, spoilt on some of its levels."""
    root, objects = some_objects(draw, content)
    # One message; or none, or the same one twice.
    times = draw(st.sampled_from([1, 1, 1, 1, 1, 1, 0, 2]))
    message = ProtoMessage()
    message.metadata.message_id = root
    message.metadata.reply_to_message_id = ASKED
    trees = [some_tree(draw, root, objects) for _ in range(times)]
    response = PullAppMessagesResponse(messages_list=[message] * times)
    written = response.SerializeToString() + b"".join(field(2, tree) for tree in trees)
    if draw(st.integers(0, 7)) == 7:
        written = mutate(draw, written)
    return Link(written, objects)


def some_objects(draw: Draw, content: RecordDict) -> Objects:
    """Return the objects of a message, some spoilt.

    Their ids, which the SuperLink checks, remain.
    """
    root, objects = of_message(message_of(content))
    if draw(st.integers(0, 2)) == 2:
        objects[root] = some_message(draw, objects[root])
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        # Each kind as often, however many chunks there are.
        kinds = {content.split(b" ")[0]: name for name, content in objects.items()}
        name = draw(st.sampled_from(list(kinds.values())))
        found = some_object(draw, objects[name], list(objects))
        if found is None:
            found = objects[draw(st.sampled_from(list(objects)))]
        objects[name] = found
    if draw(st.integers(0, 15)) == 15:
        root = draw(st.sampled_from(list(objects)))
    if draw(st.integers(0, 15)) == 15:
        objects |= chain(objects, root, draw(st.sampled_from([3, 90, 1100])))
    if draw(st.integers(0, 15)) == 15:
        del objects[draw(st.sampled_from(list(objects)))]
    return root, objects


def some_message(draw: Draw, content: bytes) -> bytes:
    """Return the object of a message with other facts, or an error."""
    head, _, body = content.partition(b"\x00")
    message = ProtoMessage.FromString(body)
    facts = message.metadata
    for _ in range(draw(st.integers(0, 3))):
        way = draw(st.sampled_from(["reply", "type", "group", "node", "time", "error"]))
        if way == "reply":
            facts.reply_to_message_id = draw(texts)
        elif way == "type":
            facts.message_type = draw(st.sampled_from(["", "train", "query", "x.y.z"]))
        elif way == "group":
            facts.group_id = draw(texts)
        elif way == "node":
            facts.src_node_id = draw(st.integers(0, 2**64 - 1))
        elif way == "time":
            facts.ttl = facts.created_at = draw(st.floats())
        else:
            code = draw(st.one_of(st.integers(0, 20), numbers))
            message.error.code = code
            message.error.reason = draw(texts)
    # An error has no content.
    kept = message.HasField("error") and draw(st.integers(0, 3)) > 0
    kids = [] if kept else head.decode().split(" ")[1].split(",")
    return one_object("Message", message.SerializeToString(), kids)


def some_object(draw: Draw, content: bytes, names: list[str]) -> bytes | None:
    """Return a spoilt object; None for another one of the message in its place."""
    try:
        head, body = content.split(b"\x00", 1)
        kind, told, _ = head.decode().split(" ")
    except ValueError:  # it is spoilt already
        return mutate(draw, content)
    children = told.split(",") if told else []
    way = draw(st.sampled_from(WAYS))
    if way == "bytes":
        return mutate(draw, content)
    if way == "other":
        return None
    if way == "body":
        body = some_bytes(draw, body)
    elif way == "json" and kind == "ArrayChunk":
        body = bytes(draw(st.sampled_from([0, 10**5, 2**20])))
    elif way == "json":
        body = some_json(draw, body, children)
    elif way == "kind":
        kind = draw(st.sampled_from(KINDS + OTHER_KINDS))
    else:
        known = st.sampled_from([*names, "0" * 64, "", "x"])
        children = draw(st.lists(known, max_size=4))
    return one_object(kind, body, children)


def some_json(draw: Draw, body: bytes, children: list[str]) -> bytes:
    """Return JSON in which values are others, or names are many."""
    try:
        good: Any = json.loads(body)
    except (ValueError, RecursionError):
        return some_bytes(draw, body)
    if not isinstance(good, dict) or not good or draw(st.integers(0, 7)) == 7:
        return bytes(draw(json_values), "utf-8")
    if draw(st.integers(0, 3)) == 3 and children:
        count = draw(st.integers(1, 3000))
        return json.dumps(dict.fromkeys(map(str, range(count)), children[0])).encode()
    # The last of an array's are its chunks.
    name = draw(st.sampled_from([*good, list(good)[-1]]))
    written = {key: json.dumps(value) for key, value in good.items()}
    named_often = st.sampled_from([2, 600, 10**6]).map(lambda n: json.dumps([0] * n))
    written[name] = draw(st.one_of(json_values, named_often))
    inner = ", ".join(f"{json.dumps(key)}: {value}" for key, value in written.items())
    return f"{{{inner}}}".encode()


def chain(objects: dict[str, bytes], root: str, length: int) -> dict[str, bytes]:
    """Return a root that is so many objects away from its children."""
    names = [root, *(f"{i:064x}" for i in range(length))]
    links = pairwise(names)
    found = {name: one_object("RecordDict", b"{}", [child]) for name, child in links}
    return {**found, names[-1]: objects[root]}


def some_tree(draw: Draw, root: str, objects: dict[str, bytes]) -> bytes:
    """Return a tree with the names of the objects; Flower pulls those that it names."""
    names = [name for name in objects if name != root]
    way = draw(st.sampled_from(["flat", "flat", "flat", "twice", "deep", "fewer"]))
    if way == "twice":
        names *= 2
    elif way == "fewer":
        names = names[: draw(st.integers(0, 3))]
    tree = ObjectTree(object_id=root)
    tree.children.extend(ObjectTree(object_id=name) for name in names)
    written = tree.SerializeToString()
    if way == "deep":
        # Protocol buffers are read up to a depth of 100.
        for _ in range(draw(st.sampled_from([5, 90, 200]))):
            written = field(1, root.encode()) + field(2, written)
    return written


def field(number: int, data: bytes) -> bytes:
    """Return a field of a protocol buffer."""
    size, length = bytearray(), len(data)
    while length > 127:
        size.append(length & 127 | 128)
        length >>= 7
    return bytes([number << 3 | 2, *size, length]) + data
