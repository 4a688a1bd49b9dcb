"""What a node's process keeps between the messages of a run."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from flwr.app import Context

from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.client.base_cache import find_base, keep_base
from slora_flwr.client.errors import MismatchError, MissingStateError
from slora_flwr.client.keeping import kept_in
from slora_flwr.client.permits import check_data, check_paths, masked, restricted
from slora_flwr.client.pinned import pinned_client
from slora_flwr.client.resident import in_simulation
from slora_flwr.common.tensors import State
from slora_flwr.config import RunConfig, flatten, parse
from slora_flwr.data.node_files import OwnData, OwnDataError, TooFewError
from slora_flwr.tasks.choice import find_task
from slora_flwr.training.attached_model import AttachedModel
from slora_flwr.training.trainer import Trainer
from slora_flwr.wire.base_codec import BaseCodec
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.messages import Instruction
from slora_flwr.wire.state_channel import (
    name_version,
    read_base,
    read_change,
    read_slices,
    read_state,
    read_weights,
)


class SharedContext(Context):
    """The context of a node that lives in the server's process.

    Attributes
    ----------
    model : AttachedModel or None
        The server's model, which this node uses too; None for one of its own.
    hear : Callable or None
        Called with clients that are done, before the node's reply has all of them.
    """

    model: AttachedModel | None = None
    hear: Callable[[Iterable[int]], None] | None = None


def one_by_one(clients: Iterable[int], context: Context) -> Iterator[int]:
    """Yield clients; tell a server in this process of each that is done."""
    for client in clients:
        yield client
        if isinstance(context, SharedContext) and context.hear is not None:
            context.hear([client])


class ClientProcess:
    """A run's trainer, and the versions of base and state that it received.

    Parameters
    ----------
    config, classes, model
        As in `Trainer`.
    """

    def __init__(
        self,
        config: RunConfig,
        classes: tuple[str, ...],
        model: AttachedModel | None = None,
    ) -> None:
        self.trainer = Trainer(config, classes, model)
        # The phase and the base received last, and the last two states.
        self._base: tuple[int, str] | None = None
        self._versions: dict[str, bytes] = {}

    def prepare(self, instruction: Instruction, folder: Path) -> State:
        """Attach the adapter of an instruction over its base; return the state sent.

        The base is kept in the run's folder.

        Raises
        ------
        MissingBaseError, MissingStateError
            If this node lacks what the instruction builds on.
        MismatchError
            If the adapter's fingerprint is not the server's, or the run has no such
            round.
        """
        self._check_round(instruction)
        model, phase = self.trainer.model, self.trainer.schedule[instruction.phase]
        if not self._has(instruction, instruction.base):
            self._attach_base(instruction, folder)
        adapter = model.adapter
        adapter.begin(instruction.phase_round)
        if adapter.fingerprint() != instruction.fingerprint:
            raise MismatchError(
                f"the {phase.adapter} adapter of this node has fingerprint "
                f"{adapter.fingerprint()}, the server's {instruction.fingerprint}: "
                "their masks or backbones differ"
            )
        return adapter.complete(self._read_state(instruction))

    def _check_round(self, instruction: Instruction) -> None:
        phases, rounds = len(self.trainer.schedule), self.trainer.config.rounds
        number, within = instruction.server_round, instruction.phase_round
        if instruction.phase >= phases or not within <= number <= rounds:
            raise MismatchError(
                f"the instruction is of phase {instruction.phase}, round {within} of "
                f"it and {number} of the run; allowed: phases from 0 to {phases - 1}, "
                f"and rounds up to {rounds}, of a phase no more than of the run"
            )

    def _has(self, instruction: Instruction, digest: str) -> bool:
        """Return whether this node has received a base, and it is attached.

        A model that is the server's too has the instruction's base attached already.
        """
        model, index = self.trainer.model, instruction.phase
        phase = self.trainer.schedule[index]
        attached = (model.is_attached(phase, d) for d in (digest, instruction.base))
        return self._base == (index, digest) and any(attached)

    def _attach_base(self, instruction: Instruction, folder: Path) -> None:
        """Attach the base: all of it, or a version this node has, then the changes."""
        model, delta = self.trainer.model, instruction.base_delta
        phase = self.trainer.schedule[instruction.phase]
        if delta.weights is not None:
            base = read_weights(delta.weights, model.target_shapes)
            model.attach(phase, base, instruction.base)
        else:
            start = None
            if delta.known and not self._has(instruction, delta.known):
                start = self._read_base(instruction, folder)
            if not model.is_attached(phase, instruction.base):
                model.attach(phase, start, delta.known)
            changes = [read_change(c, model.change_shapes) for c in delta.changes]
            if not model.is_attached(phase, instruction.base):
                model.change_base(changes, delta.version + 1, instruction.base)
        self._base = (instruction.phase, instruction.base)

    def _read_base(self, instruction: Instruction, folder: Path) -> BaseWeights:
        config, model = self.trainer.config, self.trainer.model
        phase = self.trainer.schedule[instruction.phase]
        data = find_base(instruction.base_delta, folder)
        rounds_before = instruction.server_round - instruction.phase_round
        shapes, positions, scaling = phase.adapter_type.base_layout(
            phase, config, model.backbone, rounds_before
        )
        codec = BaseCodec.of(config.download)
        reference: State = {}
        if not codec.values.is_plain:
            first = model.first_values(positions)
            reference = {f"{name}.values": values for name, values in first.items()}
        base = read_base(data, shapes, positions, scaling, codec, reference)
        keep_base(instruction.base_delta, folder)  # not before it is known to be one
        return base

    def _read_state(self, instruction: Instruction) -> State:
        config, model = self.trainer.config, self.trainer.model
        shapes = model.adapter.sent()
        if rank_of := model.adapter.client_ranks(config):
            largest = max(map(rank_of, instruction.clients))
            return read_slices(instruction.state, shapes, largest)
        codec = Codec.of_download(config.download, model.backbone.head_size)
        since = instruction.since
        if since and since not in self._versions:
            raise MissingStateError(f"no state {since} here")
        state, version = read_state(
            instruction.state,
            shapes,
            codec,
            model.reference,
            self._versions.get(since, b""),
        )
        if version:
            self._keep(version)
        return state

    def _keep(self, version: bytes) -> None:
        """Store a version, and drop all but the one before it.

        Nodes that share a process may be sent differences from either.
        """
        name = name_version(version)
        self._versions.pop(name, None)
        before = list(self._versions.items())[-1:]
        self._versions = {**dict(before), name: version}


make_process = lru_cache(maxsize=1)(ClientProcess)


def is_simulated(context: Context) -> bool:
    """Return whether a node is simulated on the machine of whoever runs it."""
    return isinstance(context, SharedContext) or in_simulation()


def read_config(context: Context) -> RunConfig:
    """Return the run config, if this node may open what it names.

    Raises
    ------
    OwnDataError
        If the node has data of its own and the run names other data, or if the run
        names a path that the node's config does not allow. All paths are allowed to a
        simulated node.
    """
    config = parse(context.run_config)
    check_data(config, context)
    if not is_simulated(context):
        with masked():
            check_paths(config, context)
    return config


def get_process(
    context: Context, instruction: Instruction | None = None, fewest: int = 0
) -> ClientProcess:
    """Return the run's process state; a simulation's processes reuse it.

    Parameters
    ----------
    context : Context
        The node's context.
    instruction : Instruction or None
        What the server asks for.
    fewest : int
        The fewest examples that a client of this node trains on.

    Raises
    ------
    OwnDataError
        If this node's data or model cannot be loaded, or the run may not have them.
    """
    config = read_config(context)
    if config.clients.count == 0 and not config.data.is_own:
        config = _one_client_per_node(config, context)
    with nullcontext() if is_simulated(context) else restricted(context):
        return _load(config, context, instruction, fewest)


def _load(
    config: RunConfig, context: Context, instruction: Instruction | None, fewest: int
) -> ClientProcess:
    """Return the process state with all data loaded that the instruction needs."""
    classes = tuple(instruction.classes) if instruction else ()
    model = context.model if isinstance(context, SharedContext) else None
    if not config.data.is_own:
        process = make_process(config, classes, model)
        sizes = process.trainer.data.partition.sizes
        asked = instruction.clients if instruction and fewest else []
        if any(sizes[client] < fewest for client in asked):
            raise TooFewError(f"a client has fewer than {fewest} examples", fewest)
        return process
    # Without those of a task that has some, they would be those of a file that the run
    # names. Those of a task that has none could only tell examples apart.
    wanted = find_task(config).has_classes
    if instruction is None or bool(classes) != wanted:
        allowed = "those agreed" if wanted else f"none, since the task is {config.task}"
        raise OwnDataError(
            f"the instruction has {len(classes)} classes; allowed: {allowed}"
        )
    client = pinned_client(context, instruction)
    process = make_process(config, classes, model)
    source = read_source(context, config, fewest)
    process.trainer.data.host(client, source, kept_in(context))
    return process


def read_source(context: Context, config: RunConfig, fewest: int = 0) -> OwnData:
    """Return the location of this node's own data, of at least so many examples.

    Raises
    ------
    OwnDataError
        If the node's config does not say where it is.
    """
    train = config.data.train if is_simulated(context) else ""
    dialogues = not find_task(config).has_classes
    source = OwnData.of(context.node_config, config.data, train, dialogues=dialogues)
    return replace(source, min_examples=max(source.min_examples, fewest))


def _one_client_per_node(config: RunConfig, context: Context) -> RunConfig:
    if "num-partitions" not in context.node_config:
        raise ValueError(
            "clients.count is 0, one client per node, and this node's config has no "
            "partition-id and num-partitions"
        )
    count = int(context.node_config["num-partitions"])
    per_round = min(config.clients.per_round, count)
    changed = {"clients.count": count, "clients.per-round": per_round}
    return parse(flatten(config) | changed)
