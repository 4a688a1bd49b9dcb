"""One round: its cohort, its checks of replies, its result."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from slora_flwr.aggregation.mean import FoldError, Mean
from slora_flwr.common.random import sample_cohort
from slora_flwr.common.tensors import State
from slora_flwr.common.text import counted, shorten
from slora_flwr.reports.progress import CohortProgress
from slora_flwr.runs.events import ClientRecord, RecordedRound
from slora_flwr.runs.ledger import Entry
from slora_flwr.server.collect import collect, is_gone
from slora_flwr.server.fleet import Fleet
from slora_flwr.server.guarantee import Guarantee
from slora_flwr.server.instructions import Instructions
from slora_flwr.server.journal import Journal
from slora_flwr.server.phase import ActivePhase
from slora_flwr.tasks.base import Evaluation, pool
from slora_flwr.training.process_data import held_out
from slora_flwr.training.trainer import Trainer
from slora_flwr.wire.messages import (
    MessageError,
    Report,
    is_figure,
    message_bytes,
    read_evaluation,
)
from slora_flwr.wire.packing import PayloadError

# The parts of a report with one entry for each of some clients.
_LISTS = ("clients", "examples", "losses", "seconds", "payloads", "failures")
NO_REPLY = "no reply before the deadline"
# A petabyte, which no network interface moves between two of a node's restarts.
MOST_WIRE_BYTES = 10**15


class ChangedDataError(MessageError):
    """Weights contradict the node's description, so it is queried again."""


@dataclass(frozen=True)
class Asked:
    """What a round asked of its nodes; replies are checked against it.

    Attributes
    ----------
    server_round, phase, fingerprint
        As in the instructions.
    examples : Mapping[int, Mapping[int, int]]
        The most that each client asked to train may weigh, by node: its number of
        examples, up to `clients.max-weight`.
    most : int
        Size of the largest possible coded update, in bytes.
    """

    server_round: int
    phase: int
    fingerprint: str
    examples: Mapping[int, Mapping[int, int]]
    most: int


def read_report(reply: Message, asked: Asked) -> Report:
    """Return the report in a reply, checked against what was asked.

    Raises
    ------
    MessageError
        If the report cannot be true, with the reason.
    """
    if reply.has_error():
        raise MessageError(f"error {reply.error.code}: {reply.error.reason}")
    report = Report.read(reply.content)
    sizes = asked.examples[reply.metadata.src_node_id]
    expected = {
        "round": (report.server_round, asked.server_round),
        "phase": (report.phase, asked.phase),
        "fingerprint": (report.fingerprint, asked.fingerprint),
    }
    for name, (told, wanted) in expected.items():
        if told != wanted:
            raise MessageError(f"its {name} is {told}, not {wanted}")
    for name in _LISTS:
        if (given := len(getattr(report, name))) > len(sizes):
            raise MessageError(
                f"it has {given} {name}; allowed: up to {len(sizes)}, one for each "
                "client asked"
            )
    clients, count = report.clients, len(report.clients)
    # 1.0 and True equal the client id 1 but are not client ids.
    if not all(type(client) is int for client in clients):
        raise MessageError(f"it answers for {shorten(clients)}, not client ids")
    if not {*clients} <= sizes.keys() or not clients:
        raise MessageError(
            f"it answers for {shorten(clients)}, asked for {shorten(sizes)}"
        )
    if len({*clients}) != count:
        raise MessageError(f"it answers twice for one of {shorten(clients)}")
    owned = [sizes[client] for client in clients]
    if len(report.examples) != count or not all(
        isinstance(given, int) and 0 < given <= most
        for given, most in zip(report.examples, owned, strict=True)
    ):
        raise ChangedDataError(
            f"its weights are {shorten(report.examples)}, not from 1 to "
            f"{shorten(owned)}, which are its clients' examples"
        )
    if len(report.payloads) != count or not all(
        type(given) is int and 0 < given <= asked.most for given in report.payloads
    ):
        raise MessageError(
            f"its payloads are {shorten(report.payloads)}, not bytes of each"
        )
    if len(report.wire) not in (0, 2) or not all(
        type(moved) is int and 0 <= moved <= MOST_WIRE_BYTES for moved in report.wire
    ):
        raise MessageError(f"its wire bytes are {shorten(report.wire)}, not two counts")
    for name in ("losses", "seconds"):
        figures = getattr(report, name)
        if len(figures) != count or not all(map(is_figure, figures)):
            raise MessageError(
                f"its {name} are {shorten(figures)}, not one for each client"
            )
    others = {*sizes} - {*clients}
    if not {*report.failures} <= others:
        raise MessageError(
            f"it says that {shorten(report.failures)} failed; allowed: "
            f"{shorten(sorted(others))}"
        )
    return report


class Round:
    """One attempt at a round: training on clients, then an evaluation if one is due.

    Parameters
    ----------
    number : int
        The round's number, from 1, over all phases.
    trainer : Trainer
        The server's trainer.
    phase : ActivePhase
        The phase, whose state is trained.
    fleet : Fleet
        The nodes.
    journal : Journal
        Records bytes and failures.
    privacy : Guarantee or None
        The run's privacy; None without.
    counted : dict[int, int] or None
        Each client's last round that counted; None if clients keep no residuals.
    progress : CohortProgress
        Tells how much of the cohort has answered.

    Attributes
    ----------
    cohort : dict[int, list[int]]
        The clients drawn, by node.
    answered : set[int]
        The clients whose updates are in the aggregate.
    clients : dict[int, ClientRecord]
        What is known of each of them.
    failure : str
        Why the round failed; empty if it did not.
    may_repeat : bool
        Whether the round may be held again if it fails.
    """

    def __init__(
        self,
        number: int,
        trainer: Trainer,
        phase: ActivePhase,
        fleet: Fleet,
        journal: Journal,
        privacy: Guarantee | None,
        counted: dict[int, int] | None,
        progress: CohortProgress,
    ) -> None:
        self.number = number
        self.cohort: dict[int, list[int]] = {}
        self.answered: set[int] = set()
        self.clients: dict[int, ClientRecord] = {}
        self.failure, self.may_repeat = "", True
        self._trainer, self._phase, self._fleet = trainer, phase, fleet
        self._journal, self._privacy, self._counted = journal, privacy, counted
        self._progress = progress
        self._failed: set[int] = set()
        # The size of each node's update.
        self._sizes: dict[int, float] = {}
        # Bytes of the updates, and on the nodes' interfaces by direction.
        self._payload, self._wire = 0, Counter[str]()

    def train(self, grid: Grid) -> bool:
        """Train a cohort and update the state.

        Each reply is checked, folded and freed as it arrives. Return False, and leave
        the state unchanged, if too few clients are in the aggregate, or it has no mean.
        """
        drawn = self._draw(grid)
        fold = self._gather(grid, drawn)
        return fold is not None and self._close(fold, drawn)

    def _draw(self, grid: Grid) -> list[int]:
        """Draw the cohort, deal it to nodes, and begin the phase's round."""
        config, fleet, privacy = self._trainer.config, self._fleet, self._privacy
        number = self.number
        fleet.refresh(grid, config.clients.min_replies, number)
        if privacy is not None:
            drawn = privacy.draw(fleet.clients, number)
        else:
            per_round = config.clients.per_round
            drawn = sample_cohort(fleet.clients, per_round, config.seed, number)
        self.cohort = fleet.assign(drawn)
        self._phase.begin_round()
        return drawn

    def _gather(self, grid: Grid, drawn: list[int]) -> Mean | None:
        """Return the fold of what the cohort answers; None if the round failed."""
        config, phase, fleet = self._trainer.config, self._phase, self._fleet
        number = self.number
        weights = {client: config.most_weight(fleet.sizes[client]) for client in drawn}
        sizes = {n: {c: weights[c] for c in cs} for n, cs in self.cohort.items()}
        asked = Asked(number, phase.index, phase.fingerprint, sizes, phase.largest)
        fold = phase.aggregator.make_fold()
        fold.expect(sum(weights.values()))
        if self._is_bounded:
            fold.limit = phase.sizes.bound
        most = max(map(len, self.cohort.values()), default=0)
        most = phase.most_bytes(most)
        self._instruct(grid, most, lambda reply: self._take(reply, asked, fold))
        return fold

    def _instruct(
        self,
        grid: Grid,
        most: int,
        take: Callable[[Message], None],
        letters: Mapping[int, Mapping[int, bytes]] | None = None,
    ) -> None:
        """Have the cohort train, take each reply, and record the bytes.

        Parameters
        ----------
        grid : Grid
            Flower's grid.
        most : int
            Limit on the bytes of a reply's arrays.
        take : Callable
            Takes a reply.
        letters : Mapping or None
            As in `Instruction`, by node; others are not asked. None without secure
            aggregation.
        """
        config, phase, progress = self._trainer.config, self._phase, self._progress
        number, journal = self.number, self._journal
        cohort = self.cohort
        if letters is not None:
            cohort = {node: cohort[node] for node in letters}
        record, plan = journal.directory.record, journal.planned[number]
        instructions = Instructions(
            MessageType.TRAIN,
            cohort,
            number,
            self._trainer,
            phase,
            journal,
            self._counted,
            letters or {},
        )
        messages, again = instructions.messages, instructions.complete
        drawn = [client for clients in cohort.values() for client in clients]
        size, sent = phase.bytes_due(drawn), sum(map(message_bytes, messages))
        record(Entry(number, phase.name, "down", len(drawn), size, sent, plan.down))
        received = 0
        replies = collect(
            grid, messages, config.clients.deadline, again, most, progress.hear
        )
        with progress.follow(f"{self._label} {phase.name}", len(drawn)):
            for reply, reply_size in replies:
                received += reply_size
                take(reply)
                progress.hear(self.answered | self._failed)
        self._fail_silent()
        done, size, up = len(self.answered), self._payload, self._wire.get("up")
        record(Entry(number, phase.name, "up", done, size, received, plan.up, up))
        if self._wire:
            down = self._wire["down"]
            record(Entry(number, phase.name, "down", 0, 0, 0, wire_bytes=down))

    def _close(self, fold: Mean, drawn: list[int]) -> bool:
        """Step along the fold; return False if it is of too few, or has no mean."""
        config, phase, privacy = self._trainer.config, self._phase, self._privacy
        done, wanted = len(self.answered), config.clients.min_replies
        if privacy is not None:
            wanted = min(wanted, len(drawn))  # a draw may be smaller, even empty
        if self._is_bounded and self._refuse_outliers(fold.limit):
            self.failure = "had updates far beyond the others"
            return False
        if done < wanted:
            self.failure = f"got {counted(done, 'good reply', 'good replies')}"
            return False
        try:
            if privacy is not None:
                privacy.perturb(fold, phase.returned)
            phase.step(fold)
        except FoldError as error:
            self.failure = f"ended without a state: {error}"
            return False
        if self._counted is not None:
            self._counted |= dict.fromkeys(self.answered, self.number)
        return True

    def evaluate(self, grid: Grid, state: State) -> Evaluation | None:
        """Evaluate a state on clients' held-out examples; return None without any.

        If the server has test data, the clients that trained evaluate. Otherwise all
        clients online do, so that rounds can be compared.
        """
        number, trainer = self.number, self._trainer
        phase, fleet = self._phase, self._fleet
        if not trainer.config.clients.holdout:
            return None
        if len(trainer.data.tokenised.test):
            trained = {
                node: [client for client in clients if client in self.answered]
                for node, clients in self.cohort.items()
            }
            asked = {node: clients for node, clients in trained.items() if clients}
        else:
            asked = fleet.assign(fleet.clients)
        phase.publish(state)
        if not asked:
            return None
        instructions = Instructions(
            MessageType.EVALUATE, asked, number, trainer, phase, self._journal
        )
        messages, again = instructions.messages, instructions.complete
        every = [client for clients in asked.values() for client in clients]
        size, received, silent = phase.bytes_due(every), 0, dict(asked)
        found: list[Evaluation] = []
        progress = self._progress
        replies = collect(
            grid,
            messages,
            trainer.config.clients.deadline,
            again,
            tick=progress.hear,
        )
        with progress.follow(f"{self._label} evaluation", len(every)):
            for reply, reply_size in replies:
                received += reply_size
                node = reply.metadata.src_node_id
                clients = silent.pop(node)
                try:
                    if reply.has_error():
                        raise MessageError(reply.error.reason)
                    figures = read_evaluation(
                        reply.content, trainer.task, len(trainer.data.classes)
                    )
                    phase.versions.received(node, clients)
                    fleet.note_reply(node, MessageType.EVALUATE)
                    if figures is not None:
                        own = trainer.config.clients
                        held = [held_out(fleet.sizes[c], own.holdout) for c in clients]
                        most = sum(map(own.weigh, held))
                        _check_examples(figures, most)
                        found.append(figures)
                        self._journal.record_evaluation(number, node, figures)
                except MessageError as error:
                    self._fail(node, clients, error)
                    fleet.count_unreadable(reply)
                progress.hear(clients)
        record, sent = self._journal.directory.record, sum(map(message_bytes, messages))
        record(Entry(number, phase.name, "down", len(every), size, sent))
        record(Entry(number, phase.name, "up", len(every), 0, received))
        for node, clients in silent.items():
            self._fail(node, clients, "no evaluation before the deadline")
            fleet.note_silence(node, MessageType.EVALUATE)
        return pool(found) if found else None

    def recorded(self, metrics: dict[str, float]) -> RecordedRound:
        """Return the record of the round.

        Parameters
        ----------
        metrics : dict[str, float]
            Metrics of the new state.
        """
        ledger, epsilon = self._journal.directory.ledger, None
        if self._privacy is not None:
            epsilon = self._privacy.epsilon(self.number)
        return RecordedRound(
            phase=self._phase.name,
            cohort=sorted(c for clients in self.cohort.values() for c in clients),
            clients=self.clients,
            round=self.number,
            replied=len(self.answered),
            train_loss=None if self._is_private else self._mean_loss(),
            payload_bytes=ledger.total("payload", "up")
            + ledger.total("payload", "down"),
            metrics=metrics,
            kept_energy=self._phase.kept_energy(),
            epsilon=epsilon,
        )

    def _mean_loss(self) -> float | None:
        """Return the clients' mean loss, weighted; None without any."""
        records = self.clients.values()
        if not records:
            return None
        return fmean([did.loss for did in records], [did.examples for did in records])

    def _take(self, reply: Message, asked: Asked, fold: Mean) -> None:
        """Add the update in a reply to the fold, or record why not."""
        phase, node = self._phase, reply.metadata.src_node_id
        if is_gone(reply):
            self._fleet.forget(node)
        try:
            report = read_report(reply, asked)
            fold.take(report.update, phase.returned, report.clients, report.examples)
        except (MessageError, PayloadError, FoldError) as error:
            if isinstance(error, ChangedDataError):
                self._fleet.forget(node)
            self._fail(node, self.cohort[node], error)
            self._fleet.count_unreadable(reply)
            return
        self._sizes[node] = fold.sizes[-1]
        for client, reason in report.failures.items():
            self._fail(node, [client], reason)
        for client, examples, loss, seconds in zip(
            report.clients, report.examples, report.losses, report.seconds, strict=True
        ):
            if not self._is_private:
                self.clients[client] = ClientRecord(examples, loss, round(seconds, 3))
        self.answered.update(report.clients)
        alone = len(report.clients) == 1
        self._payload += len(report.update.data) if alone else sum(report.payloads)
        self._wire.update(self._journal.wire_bytes(node, report.wire))
        phase.versions.received(node, report.clients)
        self._fleet.note_reply(node, MessageType.TRAIN)

    @property
    def _is_private(self) -> bool:
        """Whether clients tell no losses and seconds, for their examples' privacy."""
        return self._trainer.config.privacy.of_examples

    @property
    def _label(self) -> str:
        rounds = str(self._trainer.config.rounds)
        return f"round {self.number:>{len(rounds)}}/{rounds}"

    @property
    def _is_bounded(self) -> bool:
        """Whether updates far beyond the others are refused.

        An attack that the config asks for is meant to be seen, and privacy has a bound
        of its own.
        """
        return self._trainer.config.attack.kind == "none" and self._privacy is None

    def _refuse_outliers(self, limit: float) -> bool:
        """Note the sizes of the updates; return whether some are far beyond the others.

        They were refused on arrival unless the phase had no updates yet. Then the round
        fails, and is repeated with the limit that its updates give.
        """
        sizes = self._phase.sizes
        sizes.add(self._sizes.values())
        if limit < math.inf:
            return False
        far = {n: size for n, size in self._sizes.items() if size > sizes.bound}
        for node, size in far.items():
            reason = (
                f"its largest value is {size:.4g}; allowed: up to {sizes.bound:.4g}"
            )
            self._fail(node, self.cohort[node], reason)
        return bool(far)

    def _fail_silent(self) -> None:
        """Record as failed the clients that no reply mentions."""
        for node, clients in self.cohort.items():
            told = self.answered | self._failed
            silent = [client for client in clients if client not in told]
            if silent and len(silent) < len(clients):
                self._fail(node, silent, "not in its node's reply")
            elif silent:
                self._fail(node, silent, NO_REPLY)
                # It may hang, so it gets no client until it answers a query.
                self._fleet.note_silence(node, MessageType.TRAIN)

    def _fail(self, node: int, clients: list[int], reason: object) -> None:
        self._failed.update(clients)
        self._journal.record_failure(self.number, node, clients, reason)


def _check_examples(figures: Evaluation, most: int) -> None:
    if figures.examples > most:
        raise MessageError(
            f"it evaluates on {counted(figures.examples, 'example')}, and holds "
            f"out {most}"
        )
