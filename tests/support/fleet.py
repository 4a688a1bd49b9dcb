"""Nodes with prepared answers to queries."""

from collections.abc import Callable, Iterable

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.proto.node_pb2 import NodeInfo

from slora_flwr.engines.inline import InlineGrid
from slora_flwr.server.fleet import Fleet

EXPECTED: dict[str, str | int] = {
    "protocol": 7,
    "backbone": "b0ne",
    "partition": "pa27",
}


SIZES = {0: 30, 1: 20, 2: 10, 3: 10, 4: 5, 5: 1}


class FakeGrid(InlineGrid):
    """Nodes with prepared answers to queries, one for each."""

    def __init__(self, nodes: Iterable[int] = ()) -> None:
        super().__init__({})
        self.online: list[int] = list(nodes)
        self.asked: list[int] = []
        self.protocol: dict[int, int] = {}
        self.backbone: dict[int, str] = {}
        self.hosts: dict[int, list[int]] = {}
        self.partition: dict[int, str] = {}
        self.of_nodes = 1
        self.broken: dict[int, Callable[[Message], Message]] = {}
        self.silent: set[int] = set()
        self.registered: dict[int, str] = {}

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [
            NodeInfo(node_id=node, name=self.registered.get(node))
            for node in self.get_node_ids()
        ]

    def get_node_ids(self) -> Iterable[int]:
        return list(self.online)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        heard = {i: self._sent[i] for i in message_ids if i in self._sent}
        return super().pull_messages(
            [i for i, m in heard.items() if m.metadata.dst_node_id not in self.silent]
        )

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        self.asked += [message.metadata.dst_node_id for message in sent]
        return super().push_messages(sent)

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if node in self.broken:
            return self.broken[node](message)
        clients = self.hosts.get(node, list(SIZES))
        config = ConfigRecord(
            EXPECTED  # type: ignore[arg-type]
            | {
                "protocol": self.protocol.get(node, 7),
                "backbone": self.backbone.get(node, "b0ne"),
                "partition": self.partition.get(node, "pa27"),
                "nodes": self.of_nodes,
            }
        )
        metrics = MetricRecord(
            {"clients": clients, "examples": [SIZES[c] for c in clients]}
        )
        return Message(
            RecordDict({"config": config, "metrics": metrics}), reply_to=message
        )


def gathered(grid: FakeGrid, min_nodes: int = 1) -> Fleet:
    found = Fleet(EXPECTED, min_nodes, deadline=5.0)
    found.gather(grid)
    return found
