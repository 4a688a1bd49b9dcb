"""The phase under way: its base, its adapter, its state, and what a round changes."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from flwr.app import Array

from slora_flwr.aggregation.choice import make_aggregator
from slora_flwr.aggregation.mean import Mean
from slora_flwr.aggregation.server_optimizer import ServerOptimizer
from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.common.tensors import State
from slora_flwr.config.schedule import has_stopped_gaining
from slora_flwr.runs.events import Handover, RecordedRound
from slora_flwr.runs.snapshot import Snapshot
from slora_flwr.server.base_versions import BaseVersions
from slora_flwr.server.state_versions import StateVersions
from slora_flwr.training.trainer import Trainer
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.state_channel import write_change, write_slices


class ActivePhase:
    """A phase of the schedule while its rounds are held, its adapter attached.

    Parameters
    ----------
    trainer : Trainer
        This process's own, with W_0 resident.
    index : int
        Which phase of the schedule.
    base : BaseVersions
        What the adapter stands on.
    weights : BaseWeights or None
        The base's current version; None for W_0.

    Attributes
    ----------
    name : str
        The adapter's name, which is the phase's in what is written.
    phase_round : int
        The round within the phase, from 1; 0 before the first.
    state : State
        The global state: the last round's, or where the phase starts.
    keeps_residuals : bool
        Whether clients keep what the coding of an update left out.
    fingerprint : str
        Of the adapter's layout and mask in the round under way.
    returned : dict[str, torch.Size]
        The layout of an update in that round.
    largest : int
        Bytes of the largest coded update in that round.
    handoff : Handover or None
        How the phase before primed this one, where it did.
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
        self.aggregator = make_aggregator(self.phase, config, head)
        # A node of one client keeps its residual by itself.
        self.keeps_residuals = (
            config.upload.feedback
            and not self.aggregator.codec.is_exact
            and config.clients.count > 0
        )
        self.handoff: Handover | None = None
        self.fingerprint, self.returned, self.largest = "", self.adapter.returned(), 0
        self._config, self._model, self._start = config, model, self.state

    @classmethod
    def begin(
        cls, trainer: Trainer, before: "ActivePhase | None" = None
    ) -> "ActivePhase":
        """Return the schedule's first phase, or the one that follows another.

        Raises
        ------
        HandoffError
            If the phase before does not prime what it should.
        """
        index = 0 if before is None else before.index + 1
        config, phase = trainer.config, trainer.schedule[index]
        model = trainer.model
        told = None
        if before is not None and phase.primed:
            begun = time.perf_counter()
            handoff = model.hand_over(before.state, before.phase_round, phase)
            start, weights = handoff.state, handoff.patch
            took = round(time.perf_counter() - begun, 3)
            told = Handover(base=config.lora.base, energies=handoff.energies, took=took)
        else:
            model.detach()
            start, weights = phase.adapter_type.start(phase, config, model.backbone)
        base = make_base(trainer, weights)
        active = cls(trainer, index, base, base.start)
        active.handoff = told
        if before is not None:
            active.state |= {name: before.state[name] for name in model.backbone.head}
        active.state |= start
        if base.start is not None:
            # What the base gave up is what the factors start from, as it was read.
            factors = {f"{name}.lora_A": t for name, t in base.start.a.items()}
            factors |= {f"{name}.lora_B": t for name, t in base.start.b.items()}
            active.state |= {n: t for n, t in factors.items() if n in start}
        return active

    @classmethod
    def restore(cls, trainer: Trainer, snapshot: Snapshot) -> "ActivePhase":
        """Return the phase of a snapshot, after its last round."""
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
        return active

    def snapshot(self) -> Snapshot:
        """Return what `restore` takes."""
        facts = {"index": self.index, "phase_round": self.phase_round}
        return Snapshot.join(
            {
                "state": Snapshot(facts, self.state),
                "weights": Snapshot(tensors=self.weights()),
                "base": self.base.snapshot(),
                "versions": self.versions.snapshot(),
                "optimizer": self.optimizer.snapshot(),
            }
        )

    def weights(self) -> State:
        """Return the base's target matrices, where rounds change them; else nothing."""
        return self._model.base_weights() if self.phase.changes_base else {}

    def base_state(self) -> State:
        """Return what makes the state's base of W_0; nothing if it is W_0."""
        start = self.base.start
        return self.weights() or (start.state() if start else {})

    def sent(self) -> State:
        """Return what clients are sent of the state."""
        return {name: self.state[name] for name in self.adapter.sent()}

    def publish(self) -> State:
        """Make the state the one that is sent; return it as clients read it."""
        return self.versions.publish(self.sent())

    def begin_round(self) -> None:
        """Prepare the adapter and the state for a round."""
        self.adapter.begin(self.phase_round)
        self.fingerprint = self.adapter.fingerprint()
        self.returned = self.adapter.returned()
        values = sum(shape.numel() for shape in self.returned.values())
        self.largest = self.aggregator.codec.most(values)
        self.state = self.adapter.complete(self.sent())
        self._start = self.state | self.publish()

    def step(self, fold: Mean) -> None:
        """Go from a round's start to its end, in state and base, by its updates."""
        before = self.state
        self.state, change = self.aggregator.finish(
            fold,
            self._start,
            lambda update: self.optimizer.step(before, update),
            self.adapter,
        )
        if change is not None:
            self.base.change(write_change(change))
            self._model.change_base([change], self.phase_round, self.base.digest)

    def kept_energy(self) -> float | None:
        """Return the share of an open phase's delta that a handoff now would keep."""
        if not self.phase.is_open:
            return None
        return self._model.kept_energy(self.state, self.phase_round)

    def has_ended(self, history: Sequence[RecordedRound]) -> bool:
        """Return whether an open phase has stopped gaining in the rounds so far."""
        rounds = history[len(history) - self.phase_round :]
        energy = [done.kept_energy for done in rounds if done.kept_energy is not None]
        metrics = [done.metrics for done in rounds]
        accuracy = [found["accuracy"] for found in metrics if "accuracy" in found]
        figures = [energy, accuracy] if accuracy else [energy]
        return self.phase.is_open and has_stopped_gaining(*figures)

    def encode_for(
        self, node: int, clients: Iterable[int], *, anew: bool = False
    ) -> tuple[Array, str]:
        """Return the state as a node is sent it, and the version it is a difference to.

        Parameters
        ----------
        node : int
            Its id.
        clients : Iterable[int]
            Those that it shall train.
        anew : bool
            It lost the version that it had.
        """
        rank_of = self.aggregator.rank_of
        if rank_of is None:
            return self.versions.encode_for(node, anew=anew)
        return write_slices(self.sent(), max(map(rank_of, clients))), ""

    def bytes_due(self, clients: Iterable[int]) -> int:
        """Return the bytes that clients are sent, each as if it were its own node."""
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
    """Return the versions of a phase's base, of which there is the first.

    Parameters
    ----------
    trainer : Trainer
        With W_0 resident, before and after.
    start : BaseWeights or None
        The first version; None for W_0.
    """
    model = trainer.model
    codec = Codec.of_download(trainer.config.download, model.backbone.head_size)
    known: State = {}
    if start is not None and not codec.is_exact:
        known = model.known_values(start.positions)
    return BaseVersions(
        start,
        4 * model.backbone.target_size,
        model.base_weights,
        replace(codec, head=0),
        known,
    )
