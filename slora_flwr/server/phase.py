"""The phase under way: its adapter, base and state, and how a round changes them."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from flwr.app import Array

from slora_flwr.aggregation.averaged_state import AveragedState
from slora_flwr.aggregation.choice import make_aggregator
from slora_flwr.aggregation.mean import FoldError, Mean
from slora_flwr.aggregation.server_optimizer import ServerOptimizer
from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.common.tensors import State
from slora_flwr.config.schedule import has_stopped_gaining
from slora_flwr.runs.events import HandedOff, RecordedRound
from slora_flwr.runs.snapshot import Snapshot
from slora_flwr.server.base_versions import BaseVersions
from slora_flwr.server.state_versions import StateVersions
from slora_flwr.server.update_sizes import UpdateSizes
from slora_flwr.training.trainer import Trainer
from slora_flwr.wire import integers
from slora_flwr.wire.base_codec import BaseCodec
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.packing import joined_size
from slora_flwr.wire.state_channel import write_change, write_slices


class ActivePhase:
    """A phase of the schedule, from its start to its end.

    Its adapter is attached to the server's model.

    Parameters
    ----------
    trainer : Trainer
        The server's trainer, with W_0 resident.
    index : int
        Index of the phase in the schedule.
    base : BaseVersions
        The versions of the base.
    weights : BaseWeights or None
        The current version of the base; None for W_0.

    Attributes
    ----------
    name : str
        The adapter's name, which names the phase in events and in the ledger.
    phase_round : int
        The round within the phase, from 1; 0 before the first.
    state : State
        The global state after the last round; before the first, the phase's start.
    averaged : AveragedState
        The average of the states. The next phase starts from it, or from `state`;
        see `server.handoff`.
    keeps_residuals : bool
        True if clients keep what the coding of their updates leaves out.
    fingerprint : str
        Fingerprint of the adapter's layout and mask in this round.
    returned : dict[str, torch.Size]
        Layout of an update in this round.
    largest : int
        Size of the largest possible coded update in this round, in bytes.
    sizes : UpdateSizes
        The sizes of its updates.
    handoff : HandedOff or None
        The handoff by which the previous phase primed this one, if it did.
    """

    def __init__(
        self,
        trainer: Trainer,
        index: int,
        base: BaseVersions,
        weights: BaseWeights | None,
    ) -> None:
        config, model = trainer.config, trainer.model
        head = model.backbone.head_size
        self.index, self.phase = index, trainer.schedule[index]
        self.name = self.phase.adapter
        self.phase_round = 0
        self.base = base
        self.adapter = model.attach(self.phase, weights, base.digest)
        self.state = self.adapter.state()
        download = Codec.of_download(config.download, head)
        self.versions = StateVersions(download, model.reference)
        self.optimizer = ServerOptimizer(config.server.optimizer, config.server.lr)
        self.averaged = AveragedState(self.phase.average, config.server.average_decay)
        self.aggregator = make_aggregator(self.phase, config, head)
        # Without client ids, a node keeps the residual of its only client itself.
        self.keeps_residuals = (
            config.upload.feedback
            and (config.secure.aggregation or not self.aggregator.codec.is_exact)
            and config.clients.count > 0
        )
        self.sizes = UpdateSizes()
        self.handoff: HandedOff | None = None
        if self.phase.is_open:
            primed = trainer.schedule[index + 1].adapter_type
            self._primed_rank: int = primed.primed_rank(config)
        self.fingerprint, self.returned, self.largest = "", self.adapter.returned(), 0
        self._config, self._model, self._start = config, model, self.state
        self._task = trainer.task
        self._published = self.state

    @classmethod
    def begin(
        cls, trainer: Trainer, before: "ActivePhase | None" = None
    ) -> "ActivePhase":
        """Return the first phase of the schedule, or the one after `before`.

        Raises
        ------
        HandoffError
            If the handoff did not prime the phase as its config says.
        """
        index = 0 if before is None else before.index + 1
        config, phase = trainer.config, trainer.schedule[index]
        model = trainer.model
        told, continues = None, False
        on_trained: AbstractContextManager[State] = nullcontext({})
        if before is not None:
            on_trained = before.on_handed_over()
        with on_trained as trained:
            if before is not None and phase.primed:
                begun = time.perf_counter()
                handoff = model.hand_over(trained, before.phase_round, phase)
                start, weights = handoff.state, handoff.base
                continues = handoff.continues
                took = round(time.perf_counter() - begun, 3)
                told = HandedOff(
                    base=config.lora.base, energies=handoff.energies, took=took
                )
            else:
                # The head goes on, so the function does if nothing else was trained.
                head = model.backbone.head
                continues = before is not None and before.state.keys() <= head.keys()
                model.detach()
                start, weights = phase.adapter_type.start(phase, config, model.backbone)
        base = make_base(trainer, weights)
        active = cls(trainer, index, base, base.start)
        active.handoff = told
        if before is not None:
            active.state |= {name: trained[name] for name in model.backbone.head}
        active.state |= start
        if base.start is not None:
            # Factors start from the decoded values that the base gave up.
            factors = base.start.factors()
            active.state |= {n: t for n, t in factors.items() if n in start}
        if before is not None and continues:
            state, rounds = active.sent(), before.averaged.rounds
            active.averaged.begin(state, active._moving_weights(), rounds)
        return active

    @classmethod
    def restore(cls, trainer: Trainer, snapshot: Snapshot) -> "ActivePhase":
        """Return the phase in a snapshot."""
        own, weights = snapshot.part("state"), snapshot.part("weights").tensors
        base = make_base(trainer, None)
        base.restore(snapshot.part("base"))
        current = BaseWeights(weights=weights) if weights else base.start
        active = cls(trainer, own.facts["index"], base, current)
        active.phase_round = own.facts["phase_round"]
        active.adapter.begin(active.phase_round)
        active.state = {name: own.tensors[name] for name in active.adapter.shapes()}
        active.versions.restore(snapshot.part("versions"))
        active.optimizer.restore(active.state, snapshot.part("optimizer"))
        active.averaged.restore(snapshot.part("averaged"), active.sent())
        active.sizes.restore(snapshot.part("sizes"))
        return active

    def snapshot(self) -> Snapshot:
        """Return a snapshot for `restore`."""
        facts = {"index": self.index, "phase_round": self.phase_round}
        return Snapshot.join(
            {
                "state": Snapshot(facts, self.state),
                "weights": Snapshot(tensors=self.weights()),
                "base": self.base.snapshot(),
                "versions": self.versions.snapshot(),
                "optimizer": self.optimizer.snapshot(),
                "averaged": self.averaged.snapshot(),
                "sizes": self.sizes.snapshot(),
            }
        )

    @property
    def is_averaged(self) -> bool:
        """Whether the average differs from the state."""
        return self.phase.average != "none"

    @contextmanager
    def on_average(self) -> Iterator[State]:
        """Put the adapter on the average of the bases; yield the averaged state."""
        with self._model.exchanged(self.averaged.weights):
            yield self.adapter.complete(self.averaged.state)

    @contextmanager
    def on_handed_over(self) -> Iterator[State]:
        """Put the adapter on the base of the handoff; yield the state handed over."""
        if self._config.server.handoff == "last":
            yield self.adapter.complete(self.sent())
            return
        with self.on_average() as average:
            yield average

    def _moving_weights(self) -> State:
        """Return the base's target matrices, resident, if their average is kept."""
        if self.is_averaged and self.phase.changes_base:
            return self._model.target_weights
        return {}

    def weights(self) -> State:
        """Return the base's target matrices if rounds change them, else nothing."""
        return self._model.base_weights() if self.phase.changes_base else {}

    def base_state(self) -> State:
        """Return the current base as it is saved; empty for W_0."""
        start = self.base.start
        return self.weights() or (start.state() if start else {})

    def sent(self) -> State:
        """Return the part of the state that is sent to clients."""
        return {name: self.state[name] for name in self.adapter.sent()}

    def publish(self, state: State) -> State:
        """Publish a state for instructions; return it as clients decode it."""
        self._published = state
        return self.versions.publish(state)

    def begin_round(self) -> None:
        """Prepare the adapter for a round, and publish the state."""
        self.adapter.begin(self.phase_round)
        self.fingerprint = self.adapter.fingerprint()
        self.returned = self.adapter.returned()
        values = sum(shape.numel() for shape in self.returned.values())
        self.largest = self.aggregator.codec.most(values)
        self.state = self.adapter.complete(self.sent())
        self._start = self.state | self.publish(self.sent())

    def most_bytes(self, clients: int) -> int:
        """Return the size of the largest possible reply of a node to a round, in bytes.

        Parameters
        ----------
        clients : int
            Number of clients that it trains; it may answer with an update of each, or
            with their sum.
        """
        values = sum(shape.numel() for shape in self.returned.values())
        apart = joined_size([self.largest] * clients)
        return max(self.largest, apart, integers.most_bytes(values))

    def step(self, fold: Mean) -> None:
        """Update state and base with the aggregate of a round.

        Raises
        ------
        FoldError
            If the new state is not finite; the state is then unchanged.
        """
        before = self.state
        state, change = self.aggregator.finish(
            fold,
            self._start,
            lambda update: self.optimizer.step(before, update),
            self.adapter,
        )
        if not all(bool(t.isfinite().all()) for t in (state | (change or {})).values()):
            raise FoldError("its values are not finite")
        self.state = state
        if change is not None:
            self.base.change(write_change(change))
            self._model.change_base([change], self.phase_round, self.base.digest)
        self.averaged.add(self.sent(), self._moving_weights(), self.adapter.scaling)

    def kept_energy(self) -> float | None:
        """Return the share of the learned delta that a handoff would keep now.

        None if the phase is not open.
        """
        if not self.phase.is_open:
            return None
        with self.on_handed_over() as state:
            return self._model.kept_energy(state, self.phase_round, self._primed_rank)

    def has_ended(self, history: Sequence[RecordedRound]) -> bool:
        """Return whether the phase is open and has stopped gaining.

        Parameters
        ----------
        history : Sequence[RecordedRound]
            The closed rounds of the run.
        """
        rounds = history[len(history) - self.phase_round :]
        energy = [done.kept_energy for done in rounds if done.kept_energy is not None]
        metrics = [done.metrics for done in rounds]
        scores = [self._task.score(found) for found in metrics if found]
        # A state that has diverged gains nothing.
        figures = [-math.inf if score is None else score for score in scores]
        series = [energy, figures] if figures else [energy]
        return self.phase.is_open and has_stopped_gaining(*series)

    def encode_for(
        self, node: int, clients: Iterable[int], *, anew: bool = False
    ) -> tuple[Array, str]:
        """Return a node's coded state, and the version that it is a difference from.

        Parameters
        ----------
        node : int
            The node's id.
        clients : Iterable[int]
            The clients that the node is to train.
        anew : bool
            True if the node lost the version that it had.
        """
        rank_of = self.aggregator.rank_of
        if rank_of is None:
            return self.versions.encode_for(node, anew=anew)
        return write_slices(self._published, max(map(rank_of, clients))), ""

    @property
    def start(self) -> State:
        """The state that the round's clients start from, as they read it."""
        return self._start

    def bytes_due(self, clients: Iterable[int]) -> int:
        """Return the bytes to send to clients, each as if it were a separate node."""
        bases = sum(self.base.clients.bytes_due(client) for client in clients)
        if self.aggregator.rank_of is None:
            return bases + self.versions.bytes_due(clients)
        traffic, backbone = self.phase.adapter_type.traffic, self._model.backbone
        sent = [
            traffic(self.phase, self._config, backbone, self.phase_round, client)
            for client in clients
        ]
        return bases + sum(4 * values for values, _ in sent)


def make_base(trainer: Trainer, start: BaseWeights | None) -> BaseVersions:
    """Return the versions of a phase's base, holding only the first.

    Parameters
    ----------
    trainer : Trainer
        The server's trainer, with W_0 resident before and after.
    start : BaseWeights or None
        The first version; None for W_0.
    """
    model = trainer.model
    codec = BaseCodec.of(trainer.config.download)
    known: State = {}
    if start is not None and not codec.values.is_plain:
        first = model.first_values(start.positions)
        known = {f"{name}.values": values for name, values in first.items()}
    return BaseVersions(
        start,
        4 * model.backbone.target_size,
        model.base_weights,
        codec,
        known,
    )
