"""In-process nodes that record their messages and commit prescribed errors."""

import itertools
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from flwr.app import Message, MessageType, RecordDict
from flwr.common.serde import message_to_proto
from torch import Tensor

from slora_flwr.engines.inline import InlineGrid
from slora_flwr.wire.integers import decode_integers
from slora_flwr.wire.messages import Instruction, Report
from slora_flwr.wire.packing import pack, split
from slora_flwr.wire.state_channel import SUMS, UPDATES, write_sums, write_updates
from tests.support.runs import Config

# Changes a report in place, or returns other content to answer with.
Tamper = Callable[[Report], RecordDict | None]


class RecordingGrid(InlineGrid):
    """Record instructions and reports; `tampers` change the reports of some rounds."""

    def __init__(
        self,
        config: Config,
        nodes: int = 1,
        tampers: Mapping[int, Tamper] | None = None,
        bad: Iterable[int] = (2,),
    ) -> None:
        super().__init__(config, nodes)
        self.asked: list[Instruction] = []
        self.asked_nodes: list[int] = []
        self.queried: list[int] = []
        self.asked_bytes: list[int] = []
        self.reports: list[Report] = []
        self.evaluations: list[dict[str, Any]] = []
        self._tampers, self._bad = tampers or {}, set(bad)

    def _answer(self, message: Message) -> Message:
        kind, at = message.metadata.message_type, message.metadata.dst_node_id
        if kind == MessageType.QUERY:
            self.queried.append(at)
        if kind == MessageType.TRAIN:
            self.asked.append(Instruction.read(message.content))
            self.asked_nodes.append(at)
            self.asked_bytes.append(len(message_to_proto(message).SerializeToString()))
            self.before(self.asked[-1])
        reply = super()._answer(message)
        if kind == MessageType.EVALUATE:
            self.evaluations.append(dict(reply.content.metric_records["metrics"]))
        if kind != MessageType.TRAIN or reply.has_error():
            return reply
        report = Report.read(reply.content)
        number = self.asked[-1].server_round
        if at in self._bad and number in self._tampers:
            reply.content = self._tampers[number](report) or report.content()
        else:
            self.reports.append(report)
        return reply

    def before(self, asked: Instruction) -> None:
        """Run before a node reads an instruction; for subclasses."""

    def sent(self, server_round: int) -> Tensor:
        """Return the state that a round started from."""
        return values(next(i for i in self.asked if i.server_round == server_round))

    def mean(self, server_round: int) -> Tensor:
        """Return the mean of a round's good updates, computed independently."""
        good = [r for r in self.reports if r.server_round == server_round]
        total = torch.stack([weighted(report) for report in good]).sum(dim=0)
        return (total / sum(sum(report.examples) for report in good)).float()


def values(of: Instruction | Report) -> Tensor:
    array = of.state if isinstance(of, Instruction) else of.update
    if array.stype == SUMS:
        return torch.from_numpy(decode_integers(array.data, array.shape[0]))
    data = array.data
    if array.stype == UPDATES:
        data = b"".join(split(data, array.shape[0]))
    return torch.frombuffer(bytearray(data), dtype=torch.float32)


def put(report: Report, values: Tensor) -> None:
    """Put values into a report in place of those that `values` returns."""
    kind, count = report.update.stype, report.update.shape[0]
    if kind == SUMS:
        report.update = write_sums({"x": values.long()})
    elif kind == UPDATES:
        parts = values.chunk(count)
        report.update = write_updates([pack({"x": part}) for part in parts])
    else:
        report.update = pack({"x": values})


def weighted(report: Report) -> Tensor:
    """Return the sum of a node's updates, each times its examples."""
    if len(report.clients) == 1:
        return values(report).double() * report.examples[0]
    return values(report).double() / 2**30


class ShufflingGrid(RecordingGrid):
    """Replies arrive in an order drawn from a seed."""

    def __init__(self, config: Config, nodes: int, order: int) -> None:
        super().__init__(config, nodes)
        self.arrivals: list[int] = []
        self._draw = random.Random(order)
        self._waiting: list[str] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = list(super().push_messages(messages))
        self._waiting += self._draw.sample(ids, len(ids))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        if not self._waiting or self._waiting[0] not in message_ids:
            return []
        replies = list(super().pull_messages([self._waiting.pop(0)]))
        self.arrivals += [
            reply.metadata.src_node_id
            for reply in replies
            if reply.metadata.message_type == MessageType.TRAIN
        ]
        return replies


def set_to(**fields: Any) -> Tamper:
    def tamper(report: Report) -> None:
        for name, value in fields.items():
            setattr(report, name, value)

    return tamper


RUN_IDS = itertools.count(1000)


class Grid(RecordingGrid):
    """A recording grid with a new run id each time."""

    def __init__(self, config: Config, nodes: int = 1) -> None:
        super().__init__(config, nodes)
        InlineGrid.__init__(self, config, nodes, next(RUN_IDS))
