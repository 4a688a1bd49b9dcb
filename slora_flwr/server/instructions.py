"""The instructions of a round, one for each node."""

from collections.abc import Mapping
from types import MappingProxyType

from flwr.app import Message

from slora_flwr.runs.ledger import Entry
from slora_flwr.server.journal import Journal
from slora_flwr.server.phase import ActivePhase
from slora_flwr.training.trainer import Trainer
from slora_flwr.wire.messages import (
    MISSING_BASE,
    MISSING_STATE,
    Instruction,
    message_bytes,
)


class Instructions:
    """The instructions for a cohort's nodes.

    Parameters
    ----------
    message_type : str
        Flower's message type: train or evaluate.
    cohort : Mapping[int, list[int]]
        The clients, by node.
    number : int
        The round's number.
    trainer : Trainer
        The server's trainer.
    phase : ActivePhase
        The phase, with a published state.
    journal : Journal
        Records the bytes of messages that are sent again.
    counted : Mapping[int, int] or None
        Each client's last round that counted; None if clients need no residuals.

    letters : Mapping
        As in `Instruction`, by node; empty without secure aggregation.

    Attributes
    ----------
    messages : list[Message]
        One for each node.
    """

    def __init__(
        self,
        message_type: str,
        cohort: Mapping[int, list[int]],
        number: int,
        trainer: Trainer,
        phase: ActivePhase,
        journal: Journal,
        counted: Mapping[int, int] | None = None,
        letters: Mapping[int, Mapping[int, bytes]] = MappingProxyType({}),
    ) -> None:
        self._number, self._phase, self._journal = number, phase, journal
        self._deadline = trainer.config.clients.deadline
        self.messages: list[Message] = []
        # Nodes that were sent what they lacked, each with the error code that named it.
        self._sent_again: set[tuple[int, int]] = set()
        for node, clients in cohort.items():
            state, since = phase.encode_for(node, clients)
            instruction = Instruction(
                number,
                phase.index,
                clients,
                phase.fingerprint,
                state,
                base=phase.base.digest,
                phase_round=phase.phase_round,
                since=since,
                base_delta=phase.base.delta_for(node),
            )
            instruction.letters = dict(letters.get(node, {}))
            if trainer.config.data.is_own:
                instruction.classes = trainer.data.classes
            if counted is not None:
                instruction.lineage = journal.directory.lineage
                instruction.residuals = [counted.get(client, 0) for client in clients]
            self.messages.append(self._address(instruction, node, message_type))
        self._last = dict(zip(cohort, self.messages, strict=True))

    def complete(self, reply: Message) -> Message | None:
        """Return a node's instruction with the base or state that it lacks.

        Return None for any other reply, and if the node was already sent it.
        """
        node = reply.metadata.src_node_id
        code = reply.error.code if reply.has_error() else None
        if (
            code not in (MISSING_BASE, MISSING_STATE)
            or (node, code) in self._sent_again
        ):
            return None
        self._sent_again.add((node, code))
        sent = self._last[node]
        instruction = Instruction.read(sent.content)
        if code == MISSING_BASE:
            instruction.base_delta = self._phase.base.delta_for(node, anew=True)
        else:
            instruction.state, instruction.since = self._phase.encode_for(
                node, instruction.clients, anew=True
            )
        message = self._address(instruction, node, sent.metadata.message_type)
        self._last[node] = message
        name, size = self._phase.name, message_bytes(message)
        self._journal.directory.record(Entry(self._number, name, "down", 0, 0, size))
        return message

    def _address(
        self, instruction: Instruction, node: int, message_type: str
    ) -> Message:
        return Message(
            instruction.content(),
            dst_node_id=node,
            message_type=message_type,
            group_id=str(self._number),
            # Nodes ignore messages that arrive later.
            ttl=self._deadline,
        )
