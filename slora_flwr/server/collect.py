"""Replies as they come."""

import time
from collections.abc import Callable, Iterable, Iterator

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from slora_flwr.wire.messages import release

# Between polls; Flower's own `send_and_receive` sleeps three seconds.
FIRST_POLL_SECONDS, LAST_POLL_SECONDS = 0.01, 0.2
# Asked for all at once, Flower would hold all the replies that are there in memory.
PULLED_AT_ONCE = 8

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

    A reply's arrays are gone once the next reply is asked for.

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
            # At very many nodes one look takes long, and they share the machine in a
            # simulation: most of the time is theirs.
            time.sleep(max(pause, 4 * (time.monotonic() - begun)))
            pause = min(2 * pause, LAST_POLL_SECONDS)


def push(grid: Grid, messages: list[Message]) -> dict[str, int]:
    """Send messages; return the node of each that was taken, by message id."""
    taken = set(grid.push_messages(messages))
    sent = [message.metadata for message in messages]
    return {m.message_id: m.dst_node_id for m in sent if m.message_id in taken}


def pull(grid: Grid, pending: dict[str, int]) -> Iterator[Message]:
    """Yield the replies that are there, and take their messages out of `pending`.

    A reply's source is the node that was asked, whoever answers for it.
    """
    asked = list(pending)
    for start in range(0, len(asked), PULLED_AT_ONCE):
        for reply in grid.pull_messages(asked[start : start + PULLED_AT_ONCE]):
            node = pending.pop(reply.metadata.reply_to_message_id, None)
            if node is None:
                continue  # a second answer
            # For a node that is gone the SuperLink answers, under its own id.
            reply.metadata.__dict__["_src_node_id"] = node
            yield reply


def is_gone(reply: Message) -> bool:
    """Return whether the SuperLink answered, because the node did not."""
    return reply.has_error() and reply.error.code in _GONE
