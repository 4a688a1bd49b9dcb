"""A round of which the server learns the sum alone."""

from collections.abc import Callable, Iterable, Mapping
from logging import INFO, WARNING

import numpy as np
from flwr.app import Message, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from slora_flwr.aggregation.mean import FoldError, Mean
from slora_flwr.aggregation.ring_sum import NAMES, RingSum
from slora_flwr.common.text import printable, shorten
from slora_flwr.runs.ledger import Entry
from slora_flwr.secure.errors import SecureError
from slora_flwr.secure.graph import degree, link
from slora_flwr.secure.identity import ShownKeys
from slora_flwr.secure.tally import Tally
from slora_flwr.secure.terms import Terms
from slora_flwr.server.collect import collect, is_gone
from slora_flwr.server.round import MOST_WIRE_BYTES, NO_REPLY, Round
from slora_flwr.wire.messages import MessageError, message_bytes
from slora_flwr.wire.secure_messages import (
    INTRODUCE,
    TELL,
    Introduction,
    Letters,
    MaskedReport,
    Question,
    read_shares,
)

# Bytes of a reply beside its arrays, of which these messages have none.
_NO_ARRAYS = 1


class SecureRound(Round):
    """One attempt at a round with secure aggregation; see `slora_flwr.secure`.

    Nodes are its members. What the server knows of a client is that it is in the sum:
    losses, weights and norms are summed too.

    Parameters
    ----------
    attempt : int
        Which attempt at the round it is, from 1.
    others
        As in `Round`.
    """

    def __init__(self, *others: object, attempt: int) -> None:
        super().__init__(*others)  # type: ignore[arg-type]
        self._attempt = attempt
        self._loss: float | None = None
        # The node of each member, by its number.
        self._nodes: list[int] = []

    def _gather(self, grid: Grid, drawn: list[int]) -> Mean | None:
        """Return the sum of what the cohort answers; None if it cannot be read."""
        section = self._phase.phase.adapter_type.section
        fold = RingSum(self._trainer.config, section, self._phase.returned)
        least = self._trainer.config.clients.min_replies
        try:
            if len(drawn) < least:
                raise SecureError(f"{len(drawn)} clients can take part")
            tally = self._introduce(grid, fold)
            for member in sorted(tally.settle()):
                node = self._nodes[member]
                self._fail(node, self.cohort[node], "too few of its neighbours shared")
            numbers = {self._nodes[i]: i for i in sorted(tally.shared)}
            letters = {node: tally.letters_to(i) for node, i in numbers.items()}
            self._instruct(
                grid,
                tally.size,
                lambda reply: self._take_masked(reply, tally, numbers),
                letters,
            )
            phase = self._phase
            tally.about = self._trainer.digest_task(
                phase.index, phase.fingerprint, phase.base.digest, phase.start
            )
            tally.check()
            # Else the round would be held again once its sum is known, and the two sums
            # would differ by those who answered once only.
            if len(self.answered) < least:
                raise SecureError(f"{len(self.answered)} clients are in the sum")
            self._ask(grid, tally)
            opened = tally.open()
            self.may_repeat = False
            for member in sorted(tally.forgers):
                node = self._nodes[member]
                name = self._fleet.name(node)
                log(WARNING, "%s told forged shares, and the sum is right", name)
                self._fleet.forget(node)
            fold.open(*opened, len(self.answered))
        except (SecureError, FoldError) as error:
            self.failure = f"has no sum: {error}"
            return None
        self._note(fold)
        return fold

    def _introduce(self, grid: Grid, fold: RingSum) -> Tally:
        """Have the cohort's nodes share their secrets with their neighbours."""
        config = self._trainer.config
        members: list[ShownKeys] = []
        used: set[bytes] = set()
        for node in sorted(self.cohort):
            try:
                # Each is used once, whatever becomes of it.
                shown = ShownKeys.unpack(self._fleet.keys.pop(node, b""))
                keys = {shown.public.seal, shown.public.mask}
                if used & keys:
                    raise SecureError("a public key of it is another node's")
                used |= keys
                members.append(shown)
                self._nodes.append(node)
            except SecureError as error:
                self._fail(node, self.cohort[node], error)
                self._fleet.forget(node)
        terms = Terms(
            self._journal.directory.lineage,
            self.number,
            self._attempt,
            config.secure.threshold,
        )
        if len(members) < 2:
            raise SecureError(f"{len(members)} of 2 nodes or more can take part")
        each = degree(len(members), terms.threshold, config.secure.colluding)
        # Drawn anew in each attempt, by nobody's seed.
        near = link(len(members), each, np.random.default_rng())
        size = fold.grid.size
        public = [shown.public for shown in members]
        tally = Tally(terms, public, near, fold.ring, size, len(NAMES))
        questions = {
            i: Introduction(
                terms.run,
                terms.server_round,
                terms.attempt,
                i,
                public[i].pack(),
                {other: members[other].pack() for other in near[i]},
            ).content()
            for i in range(len(members))
        }

        def take(number: int, reply: Message) -> None:
            told = Letters.read(reply.content)
            tally.took_letters(number, told.letters, told.commitment)
            self._fleet.keys[self._nodes[number]] = told.keys

        def fail(number: int, reason: object) -> None:
            node, name = self._nodes[number], self._fleet.name
            self._fail(node, self.cohort[node], reason)
            if reason != NO_REPLY:  # it may name others by their numbers
                others = (f"{i} {name(self._nodes[i])}" for i in sorted(near[number]))
                told = "%s was introduced to members %s"
                log(WARNING, told, name(node), ", ".join(others))

        self._query(grid, INTRODUCE, questions, take, fail)
        return tally

    def _take_masked(
        self, reply: Message, tally: Tally, numbers: Mapping[int, int]
    ) -> None:
        """Add a node's masked sum, or record why not."""
        node, phase = reply.metadata.src_node_id, self._phase
        if is_gone(reply):
            self._fleet.forget(node)
        try:
            if reply.has_error():
                raise MessageError(f"error {reply.error.code}: {reply.error.reason}")
            report = MaskedReport.read(reply.content)
            self._check(report, self.cohort[node])
            tally.add(numbers[node], report.masked)
        except (MessageError, SecureError) as error:
            self._fail(node, self.cohort[node], error)
            self._fleet.count_unreadable(reply)
            return
        for client, reason in report.failures.items():
            self._fail(node, [client], reason)
        self.answered.update(report.clients)
        # As if each client were a node of its own.
        self._payload += len(report.masked) * len(report.clients)
        self._wire.update(self._journal.wire_bytes(node, report.wire))
        phase.versions.received(node, report.clients)
        self._fleet.note_reply(node, reply.metadata.message_type)

    def _check(self, report: MaskedReport, asked: list[int]) -> None:
        """Raise MessageError if a report cannot be true."""
        phase = self._phase
        for name, told, wanted in (
            ("round", report.server_round, self.number),
            ("phase", report.phase, phase.index),
            ("fingerprint", report.fingerprint, phase.fingerprint),
        ):
            if told != wanted:
                raise MessageError(f"its {name} is {told}, not {wanted}")
        clients = {*report.clients}
        if not clients or not clients <= {*asked}:
            answered = shorten(report.clients)
            raise MessageError(f"it answers for {answered}, asked for {shorten(asked)}")
        if len(clients) != len(report.clients):
            raise MessageError("it answers twice for a client")
        if not {*report.failures} <= {*asked} - clients:
            raise MessageError(f"it says that {shorten(report.failures)} failed")
        if len(report.wire) not in (0, 2) or any(
            moved > MOST_WIRE_BYTES for moved in report.wire
        ):
            raise MessageError(f"its wire bytes are {shorten(report.wire)}")

    def _ask(self, grid: Grid, tally: Tally) -> None:
        """Ask the members in the sum for the shares that open it."""
        questions = {
            i: Question(self.number, self._attempt, *tally.asks(i)).content()
            for i in sorted(tally.alive)
        }

        def take(number: int, reply: Message) -> None:
            tally.took_shares(number, read_shares(reply.content))

        def fail(number: int, reason: object) -> None:
            name = self._fleet.name(self._nodes[number])
            told = "%s told no shares, and its clients are in the sum: %s"
            log(WARNING, told, name, printable(reason))

        self._query(grid, TELL, questions, take, fail)

    def _query(
        self,
        grid: Grid,
        kind: str,
        questions: Mapping[int, RecordDict],
        take: Callable[[int, Message], None],
        fail: Callable[[int, object], None],
    ) -> None:
        """Ask members something; `fail` those that do not answer, or answer wrong."""
        deadline = self._trainer.config.clients.deadline
        numbers = {self._nodes[number]: number for number in questions}
        messages = [
            Message(
                question,
                dst_node_id=self._nodes[number],
                message_type=kind,
                group_id=str(self.number),
                ttl=deadline,
            )
            for number, question in questions.items()
        ]
        self._record("down", map(message_bytes, messages))
        received, silent = [], {**numbers}
        most = _NO_ARRAYS
        replies = collect(grid, messages, deadline, most=most, tick=self._progress.hear)
        for reply, size in replies:
            received.append(size)
            node = reply.metadata.src_node_id
            number = silent.pop(node)
            try:
                if reply.has_error():
                    raise MessageError(reply.error.reason)
                take(number, reply)
            except (MessageError, SecureError) as error:
                fail(number, error)
                self._fleet.forget(node)
        self._record("up", received)
        for node, number in silent.items():
            fail(number, NO_REPLY)
            self._fleet.note_silence(node, kind)

    def _record(self, way: str, sizes: Iterable[int]) -> None:
        entry = Entry(self.number, self._phase.name, way, 0, 0, sum(sizes))
        self._journal.directory.record(entry)

    def _note(self, fold: RingSum) -> None:
        """Note the mean loss; tell how the updates' norms stand to their bound."""
        if fold.has_noise:
            return
        self._loss = fold.mean("loss")
        clipped, clients = fold.total("clipped"), fold.total("clients")
        bound = fold.grid.bound
        if 2 * clipped > clients:
            told = "%s: %d of %d updates were longer than %g, and scaled down to it"
            log(WARNING, told, self._label, clipped, clients, bound)
        elif self._phase.phase_round == 1:
            told = "%s: updates have a mean norm of %.3g, of %g allowed"
            log(INFO, told, self._label, fold.mean("norm") * bound, bound)

    def _mean_loss(self) -> float | None:
        return self._loss

    @property
    def _is_bounded(self) -> bool:
        """Each client clips its own update; the server sees none."""
        return False
