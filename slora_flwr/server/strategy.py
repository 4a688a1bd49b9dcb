"""The strategy: a schedule of phases, round by round, over Flower's grid."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from logging import INFO, WARNING
from statistics import fmean

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
)
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from slora_flwr.adapters.base import Adapter
from slora_flwr.aggregation.choice import make_aggregator
from slora_flwr.aggregation.mean import FoldError, Mean
from slora_flwr.aggregation.server_optimizer import ServerOptimizer
from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.common.random import sample_cohort
from slora_flwr.common.tensors import State
from slora_flwr.common.text import printable
from slora_flwr.config import flatten
from slora_flwr.config.schedule import Phase, has_stopped_gaining
from slora_flwr.planning.rounds import plan_rounds
from slora_flwr.reports.progress import progress_line
from slora_flwr.runs.directory import RunDirectory
from slora_flwr.runs.ledger import Entry
from slora_flwr.runs.snapshot import Snapshot
from slora_flwr.server.base_versions import BaseVersions
from slora_flwr.server.collect import collect, is_gone
from slora_flwr.server.fleet import Fleet
from slora_flwr.server.privacy import Privacy
from slora_flwr.server.state_versions import StateVersions
from slora_flwr.training.metrics import Evaluation, pool
from slora_flwr.training.trainer import Trainer
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.messages import (
    MISSING_BASE,
    MISSING_STATE,
    Instruction,
    MessageError,
    Report,
    is_figure,
    message_bytes,
    read_evaluation,
)
from slora_flwr.wire.packing import PayloadError, pack, unpack
from slora_flwr.wire.state_channel import write_change, write_slices

NO_REPLY = "no reply before the deadline"


class TooFewRepliesError(RuntimeError):
    """A round that got fewer good replies than `clients.min-replies`, twice."""


class ChangedDataError(MessageError):
    """Weights that do not fit what the node told of its data: it is asked again."""


@dataclass
class Round:
    """What one round has collected so far."""

    number: int
    cohort: dict[int, list[int]]
    reports: list[Report] = field(default_factory=list)
    failed: set[int] = field(default_factory=set)
    up_message_bytes: int = 0
    wire_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def clients(self) -> list[int]:
        """Clients whose updates are in the aggregate."""
        return [client for report in self.reports for client in report.clients]

    @property
    def loss(self) -> float:
        """Mean training loss over clients, weighted by examples."""
        weights = [n for report in self.reports for n in report.examples]
        losses = [loss for report in self.reports for loss in report.losses]
        return fmean(losses, weights) if losses else math.nan


class PhasedStrategy(Strategy):
    """Run a method's phases: rounds of each, a handoff between them.

    Parameters
    ----------
    trainer : Trainer
        This process's own, for evaluation, the handoff and the layout of states.
    directory : RunDirectory
        Where events, bytes and states go.
    fleet : Fleet
        The nodes; gathered.
    checkpoint : Snapshot or None
        Of the run that goes on.
    privacy : Privacy or None
        Where privacy is on.
    """

    def __init__(
        self,
        trainer: Trainer,
        directory: RunDirectory,
        fleet: Fleet,
        checkpoint: Snapshot | None = None,
        privacy: Privacy | None = None,
    ) -> None:
        self.config = trainer.config
        self.fleet = fleet
        self.history: list[dict[str, float]] = []
        self.state: State = {}
        self._trainer, self._model = trainer, trainer.model
        self._directory = directory
        self._lengths = [phase.rounds for phase in trainer.schedule]
        self._best, self._best_round = -1.0, 0
        self._wire: dict[int, list[int]] = {}
        self._privacy = privacy
        self._server_round = 0
        # The last round of each client's that counted, where clients keep residuals.
        self._counted: dict[int, int] = {}
        if checkpoint is None:
            self._enter(0)
        else:
            self._restore(checkpoint)

    @property
    def phase(self) -> Phase:
        """The phase under way."""
        return self._trainer.schedule[self._phase]

    def summary(self) -> None:
        """Log what will run."""
        for phase in self._trainer.schedule:
            recipe = phase.recipe
            log(
                INFO,
                "%s: %d rounds of %d clients, %d epoch(s) of %s at lr %g, batch %d",
                phase.adapter,
                phase.rounds,
                self.config.clients.per_round,
                recipe.epochs,
                recipe.optimizer,
                recipe.lr,
                recipe.batch_size,
            )
        if self._privacy is not None:
            log(
                INFO,
                "privacy: noise multiplier %(noise_multiplier).3g, so epsilon "
                "%(epsilon).3g at delta %(delta).2g in the end",
                self._privacy.facts(self.config.rounds),
            )

    def initial_state(self) -> State:
        """Give the first phase's start, W_0's own values and a seeded head.

        Of a run that goes on it is the last round's state.
        """
        return self.state

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 0,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run all phases, or what is left of them.

        Parameters
        ----------
        grid : Grid
            Flower's, or the in-process one.
        initial_arrays : ArrayRecord
            The packed initial state, as `state`.
        num_rounds : int
            Unused: the schedule has its own.
        timeout : float
            Seconds until a round closes.
        train_config, evaluate_config : ConfigRecord or None
            Passed to `configure_train` and `configure_evaluate`.
        evaluate_fn : Callable or None
            Server-side evaluation; the strategy's own on the test data if None.

        Raises
        ------
        TooFewRepliesError
            If a round fails twice; the last state is in the run directory.
        """
        self.summary()
        result = Result(arrays=initial_arrays)
        arrays = initial_arrays
        self.state = unpack(arrays["state"], self._adapter.shapes())
        started = time.perf_counter()
        if self.history:
            started -= self.history[-1]["seconds"]
        phases = self._trainer.schedule
        for index in range(self._phase, len(phases)):
            phase = phases[index]
            if index > self._phase:
                self._enter(index)
                arrays = ArrayRecord({"state": pack(self.state)})
            # What an open phase leaves is the last one's.
            is_last = index == len(phases) - 1
            rounds = phase.rounds
            if is_last:
                rounds = self.config.rounds - sum(self._lengths[:index])
            self._plan(index, rounds)
            while self._phase_round < rounds and not self._has_ended():
                self._server_round = server_round = self._server_round + 1
                self._phase_round += 1
                arrays, metrics = self._train_round(
                    server_round, arrays, train_config or ConfigRecord(), grid, timeout
                )
                result.arrays = arrays
                result.train_metrics_clientapp[server_round] = metrics
                # An open phase ends by what its evaluations say.
                last = self._phase_round == rounds or phase.is_open
                if self._is_due(server_round, last):
                    found = self._evaluate_clients(
                        server_round, arrays, evaluate_config, grid, timeout
                    )
                    if found is not None:
                        result.evaluate_metrics_clientapp[server_round] = found
                    evaluated = (evaluate_fn or self.evaluate_server)(
                        server_round, arrays
                    )
                    if evaluated is not None:
                        result.evaluate_metrics_serverapp[server_round] = evaluated
                self._close_round(server_round, metrics, result, started)
            self._lengths[index] = self._phase_round
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the cohort, deal it to nodes, and write each node's instruction."""
        self.fleet.refresh(grid, wanted=self.config.clients.min_replies)
        cohort = self._draw(server_round)
        self._round = Round(server_round, self.fleet.assign(cohort))
        self._adapter.begin(self._phase_round)
        self._fingerprint = self._adapter.fingerprint()
        self.state = self._adapter.complete(self._sent())
        # What the cohort starts from.
        self._start = self.state | self._broadcast.publish(self._sent())
        messages = self._instruct(MessageType.TRAIN, self._round.cohort)
        sent = sum(message_bytes(message) for message in messages)
        planned = self._planned[server_round]
        payload = self._payload_down(cohort)
        self._note("down", len(cohort), payload, sent, planned.down)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check each reply as it comes, fold it in, drop it; then step.

        Returns
        -------
        tuple
            The new state and the round's metrics, or None twice if fewer clients than
            `clients.min-replies` are in the aggregate.
        """
        current = self._round
        fold = self._aggregator.make_fold()
        cohort = [c for clients in current.cohort.values() for c in clients]
        fold.expect(sum(self.fleet.sizes[client] for client in cohort))
        for reply in replies:
            current.up_message_bytes += message_bytes(reply)
            node = reply.metadata.src_node_id
            if is_gone(reply):
                self.fleet.forget(node)
            try:
                report = self._check(reply)
                fold.take(
                    report.update,
                    self._adapter.returned(),
                    report.clients,
                    report.examples,
                )
            except (MessageError, PayloadError, FoldError) as error:
                if isinstance(error, ChangedDataError):
                    self.fleet.forget(node)
                self._fail(node, current.cohort.get(node, []), str(error))
                continue
            for client, reason in report.failures.items():
                self._fail(node, [client], reason)
            if len(report.clients) == 1:
                report.payloads = [len(report.update.data)]
            # The tensors are folded; only the figures are kept.
            report.update = pack({})
            current.reports.append(report)
            self._broadcast.received(node, report.clients)
            self._count_wire(node, report.wire)
        answered = set(current.clients)
        for node, clients in current.cohort.items():
            silent = [c for c in clients if c not in answered | current.failed]
            if silent:
                partly = len(silent) < len(clients)
                reason = "not in its node's reply" if partly else NO_REPLY
                self._fail(node, silent, reason)
                if not partly:
                    # It may stall: it is not waited for again until it says a word.
                    self.fleet.forget(node)
        wanted = self.config.clients.min_replies
        if self._privacy is not None:
            # So few may be drawn, and nobody too.
            drawn = sum(map(len, current.cohort.values()))
            wanted = min(wanted, drawn)
        if len(answered) < wanted:
            return None, None
        self._step(fold)
        metrics = MetricRecord(
            {"num-examples": fold.weight, "train-loss": current.loss}
        )
        return ArrayRecord({"state": pack(self.state)}), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask clients to evaluate, where they hold examples out.

        Without test data on the server it is all that are online, so that rounds can be
        compared; else the round's own.
        """
        if not self.config.clients.holdout:
            return []
        trained = set(self._round.clients)
        self._evaluating = {
            node: [client for client in clients if client in trained]
            for node, clients in self._round.cohort.items()
            if not trained.isdisjoint(clients)
        }
        if not len(self._trainer.data.task.test):
            self._evaluating = self.fleet.assign(self.fleet.clients)
        self._broadcast.publish(self._sent())
        return self._instruct(MessageType.EVALUATE, self._evaluating)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Pool the clients' held-out figures."""
        silent = dict(self._evaluating)
        found: list[Evaluation] = []
        for reply in replies:
            node = reply.metadata.src_node_id
            clients = silent.pop(node, [])
            if reply.has_error():
                self._fail(node, clients, reply.error.reason)
                continue
            try:
                classes = len(self._trainer.data.classes)
                figures = read_evaluation(reply.content, classes)
            except MessageError as error:
                self._fail(node, clients, str(error))
                continue
            self._broadcast.received(node, clients)
            if figures is None:
                continue
            most = sum(self.fleet.sizes[client] for client in clients)
            if figures.examples > most:
                reason = f"it evaluates on {figures.examples} examples, and has {most}"
                self._fail(node, clients, reason)
                continue
            found.append(figures)
        for node, clients in silent.items():
            self._fail(node, clients, "no evaluation before the deadline")
            self.fleet.forget(node)
        return _metrics(pool(found)) if found else None

    def evaluate_server(
        self, server_round: int, arrays: ArrayRecord
    ) -> MetricRecord | None:
        """Evaluate on the test data in this process, None without any."""
        found = self._trainer.evaluate_test(self.state)
        return None if found is None else _metrics(found)

    @property
    def patch(self) -> BaseWeights | None:
        """What the base of the phase under way starts from, None for W_0."""
        return self._base.start

    def _enter(self, index: int) -> None:
        """Begin a phase: its base, its adapter, where it starts, a new optimiser."""
        model = self._model
        phase = self._trainer.schedule[index]
        start: State = {}
        patch = None
        if phase.primed:
            start, patch = self._hand_over(phase)
        else:
            model.detach()
            start, patch = phase.adapter_type.start(phase, self.config, model.backbone)
        self._phase, self._phase_round = index, 0
        self._base = self._make_base(patch)
        patch = self._base.start
        self._save_base(patch.state() if patch else {})
        self._adapter: Adapter = model.attach(phase, patch, self._base.digest)
        head = {n: t for n, t in self.state.items() if n in model.backbone.head}
        # What the base gave up is what the factors start from, as it was read.
        given = {f"{n}.lora_A": t for n, t in patch.a.items()} if patch else {}
        given |= {f"{n}.lora_B": t for n, t in patch.b.items()} if patch else {}
        start |= {name: t for name, t in given.items() if name in start}
        self.state = {**self._adapter.state(), **head, **start}
        self._begin_phase()

    def _make_base(self, patch: BaseWeights | None) -> BaseVersions:
        model = self._model
        codec = self._download
        known: State = {}
        if patch is not None and not codec.is_exact:
            known = model.known_values(patch.positions)
        return BaseVersions(
            patch,
            4 * model.backbone.target_size,
            model.base_weights,
            replace(codec, head=0),
            known,
        )

    @property
    def _download(self) -> Codec:
        return Codec.of_download(self.config.download, self._model.backbone.head_size)

    def _begin_phase(self) -> None:
        """Make what a phase has of its own, once its adapter is attached."""
        config, head = self.config, self._model.backbone.head_size
        self._broadcast = StateVersions(self._download, self._model.reference)
        self._optimizer = ServerOptimizer(config.server.optimizer, config.server.lr)
        self._aggregator = make_aggregator(self.phase, config, head)
        upload = self._aggregator.codec
        # A node of one client keeps its residual by itself.
        self._keeps_residuals = (
            config.upload.feedback and not upload.is_exact and config.clients.count > 0
        )

    def _snapshot(self) -> Snapshot:
        """Give what `_restore` takes."""
        facts = {
            "phase": self._phase,
            "phase_round": self._phase_round,
            "lengths": self._lengths,
            "history": self.history,
            "best": [self._best, self._best_round],
            "counted": [*self._counted.items()],
        }
        weights = self._model.base_weights() if self.phase.changes_base else {}
        snapshot = Snapshot.join(
            {
                "strategy": Snapshot(facts, self.state),
                "weights": Snapshot(tensors=weights),
                "base": self._base.snapshot(),
                "broadcast": self._broadcast.snapshot(),
                "optimizer": self._optimizer.snapshot(),
            }
        )
        snapshot.facts |= {
            "config": flatten(self.config),
            "identity": self.fleet.expected,
            "round": self._server_round,
            "agreed": self.fleet.agreed(),
        }
        return snapshot

    def _restore(self, checkpoint: Snapshot) -> None:
        """Go on from the end of a round."""
        model, own = self._model, checkpoint.part("strategy")
        self._server_round = checkpoint.facts["round"]
        self._phase, self._phase_round = own.facts["phase"], own.facts["phase_round"]
        self._lengths, self.history = own.facts["lengths"], own.facts["history"]
        self._best, self._best_round = own.facts["best"]
        self._counted = dict(own.facts["counted"])
        self._base = self._make_base(None)
        self._base.restore(checkpoint.part("base"))
        patch, weights = self._base.start, checkpoint.part("weights").tensors
        if weights:
            patch = BaseWeights(weights=weights)
        self._adapter = model.attach(self.phase, patch, self._base.digest)
        self._adapter.begin(self._phase_round)
        self.state = {name: own.tensors[name] for name in self._adapter.shapes()}
        self._begin_phase()
        self._broadcast.restore(checkpoint.part("broadcast"))
        self._optimizer.restore(self.state, checkpoint.part("optimizer"))
        # They may be those of a later round.
        self._save_base(weights or (patch.state() if patch else {}))
        self._directory.save_state("last", self.state, **self._facts)
        self._directory.drop_checkpoints(self._best_round)

    @property
    def _facts(self) -> dict[str, str]:
        """What is written beside a state."""
        facts = {"round": str(self._server_round), "phase": self.phase.adapter}
        return facts | {"base": self._base.digest}

    def _save_base(self, state: State) -> None:
        """Write the base that the next states stand on; empty for W_0."""
        if state:
            self._directory.save_state("base", state, digest=self._base.digest)
        else:
            self._directory.drop_state("base")

    def _step(self, fold: Mean) -> None:
        """Go from the round's start to the next one's, in state and base."""
        if self._privacy is not None:
            self._privacy.perturb(fold, self._adapter.returned())
        before = self.state
        self.state, change = self._aggregator.finish(
            fold,
            self._start,
            lambda update: self._optimizer.step(before, update),
            self._adapter,
        )
        if change is not None:
            self._base.change(write_change(change))
            self._model.change_base([change], self._phase_round, self._base.digest)
            self._save_base(self._model.base_weights())

    def _draw(self, server_round: int) -> list[int]:
        """Draw a round's cohort."""
        if self._privacy is not None:
            return self._privacy.draw(self.fleet.clients, server_round)
        clients = self.config.clients
        return sample_cohort(
            self.fleet.clients, clients.per_round, self.config.seed, server_round
        )

    def _sent(self) -> State:
        """Take what a client is sent of the state."""
        return {name: self.state[name] for name in self._adapter.sent()}

    def _payload_down(self, clients: Iterable[int]) -> int:
        """Count what clients are sent, each as if it were a node of its own."""
        bases = sum(self._base.clients.bytes_due(client) for client in clients)
        if not self._aggregator.rank_of:
            return bases + self._broadcast.bytes_due(clients)
        return bases + sum(4 * self._values_sent(client) for client in clients)

    def _values_sent(self, client: int) -> int:
        """Return how many values a client is sent, whose rank may be smaller."""
        sent, _ = self.phase.adapter_type.traffic(
            self.phase,
            self.config,
            self._model.backbone,
            self._phase_round,
            client,
        )
        return int(sent)

    def _plan(self, index: int, rounds: int) -> None:
        """Plan the run again, now that it is known how long a phase takes at most."""
        self._lengths[index] = rounds
        plan = plan_rounds(
            self.config, self._model.backbone, self.fleet.clients, self._lengths
        )
        self._planned = {planned.number: planned for planned in plan}

    def _has_ended(self) -> bool:
        """Tell whether an open phase ends here."""
        return self.phase.is_open and has_stopped_gaining(*self._gains())

    def _gains(self) -> list[list[float]]:
        """List what an open phase's end depends on, round by round."""
        rounds = [h for h in self.history if h["phase"] == self._phase]
        accuracy = [h["accuracy"] for h in rounds if "accuracy" in h]
        return [[h["kept_energy"] for h in rounds], *([accuracy] if accuracy else [])]

    def _is_due(self, server_round: int, last: bool) -> bool:
        every = self.config.run.eval_every
        return last or (every > 0 and server_round % every == 0)

    def _train_round(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
        timeout: float,
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Hold a round, a second time if it gets too few good replies."""
        for attempt in (1, 2):
            messages = self.configure_train(server_round, arrays, config, grid)
            replies = collect(grid, messages, timeout, self._with_missing)
            after, metrics = self.aggregate_train(server_round, replies)
            clients = self._round.clients
            size = sum(n for report in self._round.reports for n in report.payloads)
            sent, planned = self._round.up_message_bytes, self._planned[server_round]
            wire = self._round.wire_bytes
            self._note("up", len(clients), size, sent, planned.up, wire.get("up"))
            if wire:
                self._note("down", 0, 0, 0, wire=wire["down"])
            if after is not None and metrics is not None:
                if self._keeps_residuals:
                    self._counted |= dict.fromkeys(clients, server_round)
                return after, metrics
            log(
                WARNING,
                "round %d: %d good replies, clients.min-replies is %d%s",
                server_round,
                len(self._round.clients),
                self.config.clients.min_replies,
                "; trying once more" if attempt == 1 else "",
            )
        raise TooFewRepliesError(
            f"round {server_round} got {len(self._round.clients)} good replies twice; "
            f"clients.min-replies is {self.config.clients.min_replies}. The run "
            f"directory {self._directory.path} holds what was done before, from which "
            "run.resume goes on"
        )

    def _evaluate_clients(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord | None,
        grid: Grid,
        timeout: float,
    ) -> MetricRecord | None:
        messages = self.configure_evaluate(
            server_round, arrays, config or ConfigRecord(), grid
        )
        messages = list(messages)
        if not messages:
            return None
        replies = list(collect(grid, messages, timeout, self._with_missing))
        clients = [c for clients in self._evaluating.values() for c in clients]
        for direction, payload, sent in (
            ("down", self._payload_down(clients), messages),
            ("up", 0, replies),
        ):
            size = sum(message_bytes(message) for message in sent)
            self._note(direction, len(clients), payload, size)
        return self.aggregate_evaluate(server_round, replies)

    def _instruct(
        self, message_type: str, cohort: dict[int, list[int]]
    ) -> list[Message]:
        messages = []
        self._sent_anew: set[tuple[int, int]] = set()
        for node, clients in cohort.items():
            state, since = self._broadcast.encode_for(node)
            if rank_of := self._aggregator.rank_of:
                largest = max(map(rank_of, clients))
                state = write_slices(self._sent(), largest)
            instruction = Instruction(
                self._round.number,
                self._phase,
                clients,
                self._fingerprint,
                state,
                base=self._base.digest,
                phase_round=self._phase_round,
                since=since,
            )
            if self.config.data.is_own:
                instruction.classes = self._trainer.data.classes
            if self._keeps_residuals and message_type == MessageType.TRAIN:
                instruction.lineage = self._directory.lineage
                instruction.residuals = [self._counted.get(c, 0) for c in clients]
            instruction.base_delta = self._base.delta_for(node)
            messages.append(
                Message(
                    instruction.content(),
                    dst_node_id=node,
                    message_type=message_type,
                    group_id=str(self._round.number),
                    # What came too late is not trained on any more.
                    ttl=self.config.clients.deadline,
                )
            )
        self._instructions = {m.metadata.dst_node_id: m for m in messages}
        return messages

    def _with_missing(self, reply: Message) -> Message | None:
        """Write the instruction again, for a node that lost the base or the state."""
        if not reply.has_error():
            return None
        code = reply.error.code
        sent = self._instructions[reply.metadata.src_node_id]
        node = sent.metadata.dst_node_id
        if code not in (MISSING_BASE, MISSING_STATE) or (node, code) in self._sent_anew:
            return None  # had it been sent that already, it would be another failure
        self._sent_anew.add((node, code))
        instruction = Instruction.read(sent.content)
        if code == MISSING_BASE:
            instruction.base_delta = self._base.delta_for(node, anew=True)
        else:
            state, since = self._broadcast.encode_for(node, anew=True)
            instruction.state, instruction.since = state, since
        message = Message(
            instruction.content(),
            dst_node_id=sent.metadata.dst_node_id,
            message_type=sent.metadata.message_type,
            group_id=sent.metadata.group_id,
            ttl=sent.metadata.ttl,
        )
        self._instructions[sent.metadata.dst_node_id] = message
        self._note("down", 0, 0, message_bytes(message))
        return message

    def _check(self, reply: Message) -> Report:
        """Read a reply; refuse one that does not fit the round.

        Raises
        ------
        MessageError
            With the reason.
        """
        if reply.has_error():
            raise MessageError(f"error {reply.error.code}: {reply.error.reason}")
        report = Report.read(reply.content)
        node = reply.metadata.src_node_id
        expected = {
            "round": (report.server_round, self._round.number),
            "phase": (report.phase, self._phase),
            "fingerprint": (report.fingerprint, self._fingerprint),
        }
        for name, (given, wanted) in expected.items():
            if given != wanted:
                raise MessageError(f"its {name} is {given}, not {wanted}")
        asked = self._round.cohort.get(node, [])
        # A number that only equals a client's id would not do as one.
        if not all(type(client) is int for client in report.clients):
            raise MessageError(f"it answers for {report.clients}, not client ids")
        if not set(report.clients) <= set(asked) or not report.clients:
            raise MessageError(f"it answers for {report.clients}, asked for {asked}")
        if len({*report.clients}) != len(report.clients):
            raise MessageError(f"it answers twice for one of {report.clients}")
        owned = [self.fleet.sizes[client] for client in report.clients]
        if len(report.examples) != len(owned) or not all(
            isinstance(given, int) and 0 < given <= most
            for given, most in zip(report.examples, owned, strict=True)
        ):
            raise ChangedDataError(
                f"its weights are {report.examples}, not from 1 to {owned}, which are "
                "its clients' examples"
            )
        shapes = self._adapter.returned().values()
        most = self._aggregator.codec.most(sum(shape.numel() for shape in shapes))
        if len(report.payloads) != len(owned) or not all(
            type(given) is int and 0 < given <= most for given in report.payloads
        ):
            raise MessageError(f"its payloads are {report.payloads}, not bytes of each")
        if len(report.wire) not in (0, 2) or not all(
            type(count) is int and count >= 0 for count in report.wire
        ):
            raise MessageError(f"its wire bytes are {report.wire}, not two counts")
        for name in ("losses", "seconds"):
            figures = getattr(report, name)
            if len(figures) != len(owned) or not all(map(is_figure, figures)):
                raise MessageError(f"its {name} are {figures}, not one for each client")
        others = set(asked) - set(report.clients)
        if not set(report.failures) <= others:
            failed = [*report.failures]
            raise MessageError(f"it says that {failed} failed; it might of {others}")
        return report

    def _count_wire(self, node: int, counted: list[int]) -> None:
        """Add what a node's interface moved since its last reply."""
        before = self._wire.get(node)
        if counted:
            self._wire[node] = counted
        if not (counted and before):
            return
        found = self._round.wire_bytes
        for way, now, then in zip(("down", "up"), counted, before, strict=True):
            # A container that was made anew counts from zero.
            found[way] = found.get(way, 0) + (now - then if now >= then else now)

    def _fail(self, node: int, clients: list[int], reason: object) -> None:
        reason = printable(reason)
        failure = {"node": node, "clients": clients, "reason": reason}
        self._round.failed.update(clients)
        name = self.fleet.name(node)
        log(WARNING, "%s, clients %s left out: %s", name, clients, reason)
        self._directory.event("failure", round=self._round.number, **failure)

    def _note(
        self,
        direction: str,
        clients: int,
        payload: int,
        sent: int,
        planned: int | None = None,
        wire: int | None = None,
    ) -> None:
        number, phase = self._round.number, self.phase.adapter
        self._directory.record(
            Entry(number, phase, direction, clients, payload, sent, planned, wire)
        )

    def _close_round(
        self,
        server_round: int,
        metrics: MetricRecord,
        result: Result,
        started: float,
    ) -> None:
        """Write events and states of a round, and say how it stands."""
        current, directory = self._round, self._directory
        ledger = directory.ledger
        seconds = time.perf_counter() - started
        figures: dict[str, float] = {
            "round": server_round,
            "phase": self._phase,
            "replied": len(current.clients),
            "train_loss": current.loss,
            "seconds": seconds,
            "payload_bytes": ledger.total("payload", "up")
            + ledger.total("payload", "down"),
        }
        clients = result.evaluate_metrics_clientapp.get(server_round)
        server = result.evaluate_metrics_serverapp.get(server_round)
        # Without test data on the server the clients' figures are the run's.
        own = "client_" if len(self._trainer.data.task.test) else ""
        for prefix, found in ((own, clients), ("", server)):
            for name, value in (found or {}).items():
                if name != "num-examples":
                    figures[prefix + name.replace("-", "_")] = float(value)  # type: ignore[arg-type]
        if self.phase.is_open:
            kept = self._model.kept_energy(self.state, self._phase_round)
            figures["kept_energy"] = kept
        if self._privacy is not None:
            figures["epsilon"] = self._privacy.epsilon(server_round)
        self.history.append(figures)
        directory.event(
            "round",
            phase=self.phase.adapter,
            cohort=sorted(c for clients in current.cohort.values() for c in clients),
            clients={
                str(client): {"examples": n, "loss": loss, "seconds": round(s, 3)}
                for report in current.reports
                for client, n, loss, s in zip(
                    report.clients,
                    report.examples,
                    report.losses,
                    report.seconds,
                    strict=True,
                )
            },
            **{k: v for k, v in figures.items() if k not in ("seconds", "phase")},
        )
        directory.save_state("last", self.state, **self._facts)
        accuracy = figures.get("accuracy", -1.0)
        if accuracy > self._best:
            self._best, self._best_round = accuracy, server_round
            directory.save_state("best", self.state, **self._facts)
            directory.copy_state("base", "best-base")
        # Last, so that it never speaks of what is not there.
        directory.save_checkpoint(server_round, self._best_round, self._snapshot())
        asked = sum(len(clients) for clients in current.cohort.values())
        log(
            INFO,
            progress_line(
                self.config.rounds,
                self.phase.adapter,
                figures,
                asked,
            ),
        )

    def _hand_over(self, phase: Phase) -> tuple[State, BaseWeights | None]:
        """Prime the next phase by what the sparse phase learned."""
        started = time.perf_counter()
        handoff = self._model.hand_over(self.state, self._phase_round, phase)
        kept = fmean(handoff.energies.values())
        log(
            INFO,
            "handoff: rank %d keeps %.1f%% of the delta's energy (%.1f%% at worst)",
            self.config.lora.rank,
            100 * kept,
            100 * min(handoff.energies.values()),
        )
        self._directory.event(
            "handoff",
            base=self.config.lora.base,
            energies=handoff.energies,
            took=round(time.perf_counter() - started, 3),
        )
        return handoff.state, handoff.patch


def _metrics(found: Evaluation) -> MetricRecord:
    return MetricRecord(
        {
            "num-examples": found.examples,
            "loss": found.loss,
            "accuracy": found.accuracy,
            "macro-f1": found.macro_f1,
            "majority-accuracy": found.majority_accuracy,
        }
    )
