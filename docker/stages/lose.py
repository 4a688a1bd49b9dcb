"""Hold a run on the inline engine of which a node is lost, for docker/test.sh.

    python3 lose.py NODES CLIENT KIND ROUND KEY=VALUE...

The node of a client answers neither the message of a kind in a round, nor any after it.
"""

import sys
from collections.abc import Iterable, Mapping

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from slora_flwr.config import Value
from slora_flwr.config.arguments import merge_arguments
from slora_flwr.engines.inline import InlineGrid
from slora_flwr.server.run import run


class LosingGrid(InlineGrid):
    """Nodes of which one is lost.

    Parameters
    ----------
    run_config, nodes
        As in `InlineGrid`.
    node : int
        The node's id.
    stage : tuple[str, str]
        The kind and the round of the first message that it does not answer.
    """

    def __init__(
        self,
        run_config: Mapping[str, Value],
        nodes: int,
        node: int,
        stage: tuple[str, str],
    ) -> None:
        super().__init__(run_config, nodes)
        self._node, self._stage, self._is_lost = node, stage, False

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes that are there."""
        gone = {self._node} if self._is_lost else set()
        return [node for node in super().get_node_ids() if node not in gone]

    def _answer(self, message: Message) -> Message:
        facts = message.metadata
        if facts.dst_node_id == self._node:
            self._is_lost |= (facts.message_type, facts.group_id) == self._stage
            if self._is_lost:
                error = Error(ErrorCode.NODE_UNAVAILABLE, "it was lost")
                return Message(error, reply_to=message)
        return super()._answer(message)


def main() -> None:
    """Hold the run."""
    nodes, client, kind, number, *values = sys.argv[1:]
    config = merge_arguments(values)
    grid = LosingGrid(config, int(nodes), int(client) + 1, (kind, number))
    run(grid, config, grid.run.run_id, share=grid.share)


if __name__ == "__main__":
    main()
