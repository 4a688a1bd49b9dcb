"""Collection of replies as they arrive."""

import time
from collections.abc import Callable, Iterable, Iterator

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from slora_flwr.wire.messages import release

# Pause between polls; Flower's own `send_and_receive` sleeps three seconds.
FIRST_POLL_SECONDS, LAST_POLL_SECONDS = 0.01, 0.2
# Flower loads all replies of one pull into memory, so a pull asks for only a few.
PULLED_AT_ONCE = 8

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
) -> Iterator[Message]:
    """Send messages and yield each reply once, as it arrives.

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
    """
    until = time.monotonic() + deadline
    pending = push(grid, list(messages))
    pause = FIRST_POLL_SECONDS
    while pending:
        # Checked before the pull, so that replies present at the deadline count.
        late = time.monotonic() >= until
        before, begun = len(pending), time.monotonic()
        for reply in pull(grid, pending):
            instead = again(reply)
            if instead is None:
                yield reply
                release(reply)
            else:
                pending |= push(grid, [instead])
        if late:
            return
        if len(pending) < before:
            pause = FIRST_POLL_SECONDS
        else:
            # With very many nodes a poll takes long, and simulated nodes share this
            # machine, so most of the time is left to them.
            time.sleep(max(pause, 4 * (time.monotonic() - begun)))
            pause = min(2 * pause, LAST_POLL_SECONDS)


def push(grid: Grid, messages: list[Message]) -> dict[str, int]:
    """Send messages; return the node of each accepted message, by message id."""
    taken = set(grid.push_messages(messages))
    sent = [message.metadata for message in messages]
    return {m.message_id: m.dst_node_id for m in sent if m.message_id in taken}


def pull(grid: Grid, pending: dict[str, int]) -> Iterator[Message]:
    """Yield the replies that have arrived, and remove their messages from `pending`.

    A reply's source is the node that was asked, even if the SuperLink answered for it.
    """
    asked = list(pending)
    for start in range(0, len(asked), PULLED_AT_ONCE):
        for reply in grid.pull_messages(asked[start : start + PULLED_AT_ONCE]):
            node = pending.pop(reply.metadata.reply_to_message_id, None)
            if node is None:
                continue  # a duplicate
            # The SuperLink answers for a missing node under its own id.
            reply.metadata.__dict__["_src_node_id"] = node
            yield reply


def is_gone(reply: Message) -> bool:
    """Return whether the SuperLink answered in place of the node."""
    return reply.has_error() and reply.error.code in _GONE
