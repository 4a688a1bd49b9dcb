"""Replies as they come."""

import time
from collections.abc import Callable, Iterable, Iterator

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

# Between polls; Flower's own `send_and_receive` sleeps three seconds.
FIRST_POLL_SECONDS, LAST_POLL_SECONDS = 0.01, 0.2

# With these the SuperLink answers for a node that is gone or came too late.
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
) -> Iterator[Message]:
    """Send messages and yield each reply once, when it is there.

    Parameters
    ----------
    grid : Grid
        Flower's way to the nodes.
    messages : Iterable[Message]
        To different nodes.
    deadline : float
        Seconds after which replies are no longer waited for.
    again : Callable
        Given a reply, the message to send in its place, or None to yield the reply.
    """
    until = time.monotonic() + deadline
    pending = push(grid, list(messages))
    pause = FIRST_POLL_SECONDS
    while pending:
        # Before the pull: replies that are there at the deadline count.
        late = time.monotonic() >= until
        replies = pull(grid, pending)
        for reply in replies:
            instead = again(reply)
            if instead is None:
                yield reply
            else:
                pending |= push(grid, [instead])
        if late:
            return
        if not replies:
            time.sleep(pause)
        pause = FIRST_POLL_SECONDS if replies else min(2 * pause, LAST_POLL_SECONDS)


def push(grid: Grid, messages: list[Message]) -> dict[str, int]:
    """Send messages; give the node of each that was taken, by message id."""
    taken = set(grid.push_messages(messages))
    sent = [message.metadata for message in messages]
    return {m.message_id: m.dst_node_id for m in sent if m.message_id in taken}


def pull(grid: Grid, pending: dict[str, int]) -> list[Message]:
    """Take the replies that are there, and their messages out of `pending`.

    A reply's source is the node that was asked, whoever answers for it.
    """
    replies = list(grid.pull_messages(set(pending)))
    for reply in replies:
        node = pending.pop(reply.metadata.reply_to_message_id)
        # For a node that is gone the SuperLink answers, under its own id.
        reply.metadata.__dict__["_src_node_id"] = node
    return replies


def is_gone(reply: Message) -> bool:
    """Tell whether the SuperLink answered, because the node did not."""
    return reply.has_error() and reply.error.code in _GONE
