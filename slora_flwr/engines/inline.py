"""The inline engine: a grid whose nodes live in this process, without Ray."""

import itertools
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from logging import ERROR
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.common.logger import log, update_console_handler
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from slora_flwr.client import handlers as node
from slora_flwr.client.process import SharedContext, make_process
from slora_flwr.config import Value, parse
from slora_flwr.reports.live_table import LiveTable
from slora_flwr.reports.progress import CohortProgress
from slora_flwr.server.run import run as run_on
from slora_flwr.training.attached_model import AttachedModel
from slora_flwr.wire.messages import release


def run_inline(run_config: Mapping[str, Value], nodes: int = 1) -> dict[str, Any]:
    """Run a method in this process, and return the content of summary.json.

    Parameters
    ----------
    run_config : Mapping[str, Value]
        The run's flat config.
    nodes : int
        Number of nodes; `clients.min-nodes` if that is more.
    """
    nodes = max(nodes, parse(run_config).clients.min_nodes)
    update_console_handler(colored=sys.stderr.isatty())
    run_id = time.time_ns()
    grid = InlineGrid(run_config, nodes, run_id)
    live = LiveTable.of_terminal(stderr=True)
    progress = CohortProgress(live)
    grid.tell(progress.hear)
    with nullcontext() if live is None else live.heed_log():
        return run_on(
            grid,
            run_config,
            run_id,
            share=grid.share,
            engine="inline",
            progress=progress,
        )


class InlineGrid(Grid):
    """Nodes in this process, each answering a message when its reply is pulled.

    Parameters
    ----------
    run_config : Mapping[str, Value]
        The run's flat config.
    nodes : int
        Number of nodes.
    run_id : int
        Run id for contexts and messages.
    """

    def __init__(
        self, run_config: Mapping[str, Value], nodes: int = 1, run_id: int = 1
    ) -> None:
        self._run = Run.create_empty(run_id)
        # Flower's launcher sets these in a ServerApp's process; messages carry them.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, 0, 0
        self._ids = itertools.count(1)
        self._sent: dict[str, Message] = {}
        self._contexts = {
            node_id: SharedContext(
                run_id=run_id,
                node_id=node_id,
                node_config={"partition-id": node_id - 1, "num-partitions": nodes},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for node_id in range(1, nodes + 1)
        }

    def share(self, model: AttachedModel) -> None:
        """Have all nodes use the server's model, so that the process holds only one."""
        make_process.cache_clear()  # which may hold an earlier run's model
        for context in self._contexts.values():
            context.model = model

    def tell(self, hear: Callable[[Iterable[int]], None]) -> None:
        """Have all nodes tell of each client that is done."""
        for context in self._contexts.values():
            context.hear = hear

    def set_run(self, run: Run) -> None:
        """Set the run's metadata."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run's metadata."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message with the given content."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Store messages until their replies are pulled, and return their ids."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(next(self._ids))
            ids.append(message.metadata.message_id)
            self._sent[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Yield the replies to the given messages that are not answered yet."""
        sent = [self._sent.pop(i) for i in message_ids if i in self._sent]
        # Lazily, so that only one reply is in memory at a time.
        return map(self._answer, sent)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages, then pull their replies."""
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        # Serialised and parsed, so that node and server share no objects.
        message = message_from_proto(message_to_proto(message))
        context = self._contexts[message.metadata.dst_node_id]
        handler = node.HANDLERS[message.metadata.message_type]
        try:
            reply = handler(message, context)
        except Exception as error:  # as in Flower, a node's failure is a reply
            log(ERROR, "node %d failed", context.node_id, exc_info=error)
            reply = Message(
                Error(0, f"{type(error).__name__}: {error}"), reply_to=message
            )
        arrived = message_from_proto(message_to_proto(reply))
        release(reply)
        return arrived
