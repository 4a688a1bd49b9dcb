"""The frames between a ClientApp's process and its node's resident worker.

The resident worker first sends its identity. The other side sends `handle`, a message
and its context; or `end`. The answer is an empty frame, the reply and the context; or
an error's type, text and traceback.

Messages and contexts are Flower's own protobufs, followed by the bytes of their arrays,
which protobuf would copy five times. Frames are those of `multiprocessing.connection`.
They carry only bytes, never pickled objects.
"""

import traceback
from multiprocessing.connection import Connection

from flwr.app import Array, Context, Message
from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    message_from_proto,
    message_to_proto,
)
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.message_pb2 import Message as ProtoMessage

HANDLE, END = b"handle", b"end"
# Most bytes in a frame: of text, of a protobuf (its own limit), and of an array.
TEXT_LIMIT, PROTO_LIMIT, ARRAY_LIMIT = 1 << 20, (1 << 31) - 1, 1 << 38


def write(channel: Connection, *frames: bytes) -> None:
    """Send frames."""
    for frame in frames:
        channel.send_bytes(frame)


def message_frames(message: Message, context: Context) -> list[bytes]:
    """Return the frames of a message and its context."""
    arrays = _arrays(message, context)
    data = [array.data for array in arrays]
    try:
        for array in arrays:
            array.data = b""
        protos = message_to_proto(message), context_to_proto(context)
    finally:
        for array, own in zip(arrays, data, strict=True):
            array.data = own
    return [*(proto.SerializeToString() for proto in protos), *data]


def read_message(channel: Connection) -> tuple[Message, Context]:
    """Receive a message and its context."""
    proto = ProtoMessage.FromString(channel.recv_bytes(PROTO_LIMIT))
    message = message_from_proto(proto)
    context = context_from_proto(
        ProtoContext.FromString(channel.recv_bytes(PROTO_LIMIT))
    )
    for array in _arrays(message, context):
        array.data = channel.recv_bytes(ARRAY_LIMIT)
    return message, context


def reply_frames(reply: Message, context: Context) -> list[bytes]:
    """Return the frames of a reply and of the context after it."""
    return [b"", *message_frames(reply, context)]


def error_frames(error: BaseException) -> list[bytes]:
    """Return the frames of a handler's error; the first is not empty."""
    kind, trace = type(error), "".join(traceback.format_exception(error))
    texts = (f"{kind.__module__}:{kind.__qualname__}", str(error), trace)
    return [text.encode(errors="replace")[-TEXT_LIMIT:] for text in texts]


def read_reply(channel: Connection) -> tuple[Message, Context]:
    """Receive a reply and the context after it.

    Raises
    ------
    Exception
        With the type and text of the handler's error.
    """
    name = channel.recv_bytes(TEXT_LIMIT).decode(errors="replace")
    if not name:
        return read_message(channel)
    text = channel.recv_bytes(TEXT_LIMIT).decode(errors="replace")
    trace = channel.recv_bytes(TEXT_LIMIT).decode(errors="replace")
    # Flower identifies an error by its type's name and its text.
    module, _, qualname = name.partition(":")
    error = type(qualname, (Exception,), {"__module__": module})(text)
    error.add_note(f"In the resident worker:\n{trace}")
    raise error


def _arrays(message: Message, context: Context) -> list[Array]:
    """Return all arrays, in an order that the protobufs keep."""
    contents = [message.content] if message.has_content() else []
    return [
        array
        for content in (*contents, context.state)
        for record in content.array_records.values()
        for array in record.values()
    ]
