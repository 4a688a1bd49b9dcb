"""Collection of replies as they arrive."""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from flwr.app import Error, Message, MessageType, Metadata
from flwr.app.message.message import make_message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.superlink.grid import InMemoryGrid
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from slora_flwr.wire.inflation import bounded
from slora_flwr.wire.messages import UNREADABLE, find_reply, message_bytes, release

# Pause between polls; Flower's own `send_and_receive` sleeps three seconds.
FIRST_POLL_SECONDS, LAST_POLL_SECONDS = 0.01, 0.2

# How many replies a simulation owes at a time. Ten times a second Flower looks, for
# each of its nodes, through all messages whose reply was not pulled: a thousand of both
# take a core. It handles as many at a time as a pool of Python's has threads.
SIMULATED = 2 * min(32, (os.cpu_count() or 1) + 4)

# What reading a malformed message raises, in Flower's code and in ours. A failing
# connection raises other errors, which end the run.
_READING = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
    DecodeError,
)

# Errors that the SuperLink sends in place of a node that is gone or late.
_GONE = frozenset(
    {
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
    }
)


def collect(
    grid: Grid,
    messages: Iterable[Message],
    deadline: float,
    again: Callable[[Message], Message | None] = lambda reply: None,
    most: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Message, int]]:
    """Send messages; yield each reply once, as it arrives, with its bytes.

    A reply's arrays are freed when the next reply is requested.

    Parameters
    ----------
    grid : Grid
        Flower's grid.
    messages : Iterable[Message]
        Messages to different nodes.
    deadline : float
        Seconds to wait for replies.
    again : Callable
        Returns another message to send because of a reply; None to yield the reply.
    most : int
        Limit on the bytes of a reply's arrays.
    tick : Callable
        Called again and again while replies are missing.
    """
    until = time.monotonic() + deadline
    waiting, pending = deque(messages), dict[str, int]()
    push_some(grid, waiting, pending)
    pause = FIRST_POLL_SECONDS
    while pending:
        # Checked before the pull, so that replies present at the deadline count.
        late = time.monotonic() >= until
        before, begun = len(pending), time.monotonic()
        for reply, size in pull(grid, pending, most):
            instead = again(reply)
            if instead is None:
                yield reply, size
                release(reply)
            else:
                pending |= push(grid, [instead])
        has_news = len(pending) < before
        push_some(grid, waiting, pending)
        tick()
        if late:
            return
        if has_news:
            pause = FIRST_POLL_SECONDS
        else:
            # With very many nodes a poll takes long, and simulated nodes share this
            # machine, so most of the time is left to them.
            now = time.monotonic()
            time.sleep(min(max(pause, 4 * (now - begun)), max(0.0, until - now)))
            pause = min(2 * pause, LAST_POLL_SECONDS)


def push_some(grid: Grid, waiting: deque[Message], pending: dict[str, int]) -> None:
    """Send messages, in a simulation a few at a time.

    Parameters
    ----------
    grid : Grid
        Flower's grid.
    waiting : deque[Message]
        The messages to send. Those sent are removed.
    pending : dict[str, int]
        The nodes of messages sent before, by message id. Those sent now are added.
    """
    most = SIMULATED if isinstance(grid, InMemoryGrid) else sys.maxsize
    while waiting and len(pending) < most:
        count = min(most - len(pending), len(waiting))
        pending |= push(grid, [waiting.popleft() for _ in range(count)])


def push(grid: Grid, messages: list[Message]) -> dict[str, int]:
    """Send messages; return the node of each accepted message, by message id."""
    taken = set(grid.push_messages(messages))
    sent = [message.metadata for message in messages]
    return {m.message_id: m.dst_node_id for m in sent if m.message_id in taken}


def pull(
    grid: Grid, pending: dict[str, int], most: int = 0
) -> Iterator[tuple[Message, int]]:
    """Yield the replies that have arrived, each with its bytes.

    Their messages are removed from `pending`. Replies are pulled and read one by one:
    Flower loads all that a pull asks for into memory, and one that cannot be read would
    take the others along. In its place comes an error of code `UNREADABLE`.

    A reply's source is the node that was asked, even if the SuperLink answered for it.
    """
    for asked, node in list(pending.items()):
        try:
            with bounded(most):
                received = list(grid.pull_messages([asked]))
            if not received:
                continue
            reply = find_reply(received, asked)
            size = message_bytes(reply)
        except _READING as error:
            reply = _unreadable(grid, asked, error)
            size = 0
        del pending[asked]
        # The SuperLink answers for a missing node under its own id.
        reply.metadata.__dict__["_src_node_id"] = node
        yield reply, size


def _unreadable(grid: Grid, asked: str, error: Exception) -> Message:
    """Return an error in place of a reply that cannot be read."""
    reason = f"its reply cannot be read: {type(error).__name__}: {error}"
    metadata = Metadata(
        run_id=grid.run.run_id,
        message_id="",
        src_node_id=0,
        dst_node_id=0,
        reply_to_message_id=asked,
        group_id="",
        created_at=0.0,
        ttl=0.0,
        message_type=MessageType.QUERY,
    )
    return make_message(metadata, error=Error(UNREADABLE, reason))


def is_gone(reply: Message) -> bool:
    """Return whether the SuperLink answered in place of the node."""
    return reply.has_error() and reply.error.code in _GONE


def is_unreadable(reply: Message) -> bool:
    """Return whether the error stands in place of a reply that cannot be read."""
    return reply.has_error() and reply.error.code == UNREADABLE
