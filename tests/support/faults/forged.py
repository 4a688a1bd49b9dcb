"""Forged replies as objects, which is how Flower sends messages.

Imported by tests, and by the processes of a deployment, in which a hostile node is to
send them.
"""

import json
from collections.abc import Callable, Iterable

from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    no_object_id_recompute,
)

MEGABYTE = 2**20
# The id of the root, and all objects by their ids.
Objects = tuple[str, dict[str, bytes]]


def of_message(message: Message) -> Objects:
    """Return the objects of a message."""
    with no_object_id_recompute():
        nested = get_all_nested_objects(message)
        root = message.object_id
        return root, {name: item.deflate() for name, item in nested.items()}


def one_object(kind: str, body: bytes, children: Iterable[str] = ()) -> bytes:
    """Return an object with the right header for its body."""
    return f"{kind} {','.join(children)} {len(body)}".encode() + b"\x00" + body


def with_root(objects: Objects, root: bytes) -> Objects:
    """Return objects with another root."""
    name = get_object_id(root)
    return name, {**objects[1], name: root}


def body_of(reply: Message) -> bytes:
    """Return the protocol buffer of a message, which has no content."""
    name, found = of_message(reply)
    return found[name].split(b"\x00", 1)[1]


def no_protobuf(reply: Message) -> Objects:
    child = reply.content.object_id
    return with_root(of_message(reply), one_object("Message", b"\xff" * 9, [child]))


def other_root(reply: Message) -> Objects:
    return reply.content.object_id, of_message(reply)[1]


def empty(reply: Message) -> Objects:
    return with_root(of_message(reply), one_object("Message", body_of(reply)))


def repeated_chunk(reply: Message) -> Objects:
    """Return a reply in whose update a chunk of a megabyte is named 600 times."""
    return with_array(reply, [0] * 600, 1)


def with_array(reply: Message, chunks: list[int], arrays: int) -> Objects:
    """Return a reply with arrays of a chunk of a megabyte."""
    chunk = one_object("ArrayChunk", bytes(MEGABYTE))
    found = {get_object_id(chunk): chunk}
    names = {}
    for i in range(arrays):
        body = {"dtype": f"x{i}", "shape": [1], "stype": "slora.packed"}
        told = json.dumps(body | {"arraychunk_ids": chunks}).encode()
        array = one_object("Array", told, [get_object_id(chunk)])
        names[f"x{i}"] = get_object_id(array)
        found[get_object_id(array)] = array
    record = one_object("ArrayRecord", json.dumps(names).encode(), names.values())
    name = get_object_id(record)
    content = one_object("RecordDict", json.dumps({"arrays": name}).encode(), [name])
    inner = get_object_id(content)
    found |= {name: record, inner: content}
    root = one_object("Message", body_of(reply), [inner])
    return with_root(("", found), root)


FORGED: dict[str, Callable[[Message], Objects]] = {
    "no-protobuf": no_protobuf,
    "other-root": other_root,
    "empty": empty,
    "repeated-chunk": repeated_chunk,
}
