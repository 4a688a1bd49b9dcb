"""What a node does with a message: train, evaluate or describe its clients."""

import time
from collections.abc import Callable
from functools import wraps
from hashlib import blake2b
from logging import ERROR
from math import prod

import numpy as np
from flwr.app import (
    Array,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.common.logger import log
from torch import Size

import slora_flwr
from slora_flwr.adapters.low_rank import fill_slices, rank_shapes
from slora_flwr.aggregation.choice import make_aggregator
from slora_flwr.aggregation.mean import FoldError
from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.backbone.load import digest_of
from slora_flwr.client.network_bytes import count_wire
from slora_flwr.client.process import ClientProcess, get_process
from slora_flwr.client.sender import Sender
from slora_flwr.common.code_digest import code_digest
from slora_flwr.common.files import cache_folder, write_atomically
from slora_flwr.common.tensors import State
from slora_flwr.common.text import redact
from slora_flwr.config import RunConfig, parse
from slora_flwr.config.schedule import outside_files
from slora_flwr.data.node_files import OwnData, OwnDataError
from slora_flwr.training.attached_model import AttachedModel
from slora_flwr.training.metrics import pool
from slora_flwr.training.trainer import ClientError, Trainer
from slora_flwr.wire.codec import Codec, add, name_version
from slora_flwr.wire.messages import (
    MISSING_BASE,
    MISSING_STATE,
    Instruction,
    Report,
    release,
    write_evaluation,
)
from slora_flwr.wire.packing import pack, unpack

Handler = Callable[[Message, Context], Message]


class MissingBaseError(LookupError):
    """The base that an instruction names is not on this node."""


class MissingStateError(LookupError):
    """The state to which an instruction brings the difference is not on this node."""


class MismatchError(RuntimeError):
    """The adapter or mask of this node is not the server's."""


def _with_known_errors(handler: Handler) -> Handler:
    """Answer with errors that the server can act on."""

    @wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except MissingBaseError as error:
            return Message(Error(MISSING_BASE, str(error)), reply_to=message)
        except MissingStateError as error:
            return Message(Error(MISSING_STATE, str(error)), reply_to=message)
        except OwnDataError as error:
            # Said here alone: paths and columns are nothing that the server needs.
            log(ERROR, "%s", redact(error))
            reason = f"{_name(context)}: its data is of no use; its own log says why"
            return Message(Error(0, reason), reply_to=message)

    return answer


@_with_known_errors
def query(message: Message, context: Context) -> Message:
    """Describe this node: its code, its backbone, its clients and their sizes."""
    config = parse(context.run_config)
    code = code_digest(outside_files(config))
    described = ConfigRecord({"version": slora_flwr.__version__, "code": code})
    # How many nodes a simulation has, so that the server knows whom to wait for.
    described["nodes"] = int(context.node_config.get("num-partitions", 1))
    describe = _describe_own_data if config.data.is_own else _describe_partition
    metrics = describe(config, context, described)
    content = RecordDict({"config": described, "metrics": metrics})
    return Message(content, reply_to=message)


def _describe_partition(
    config: RunConfig, context: Context, described: ConfigRecord
) -> MetricRecord:
    trainer = get_process(context).trainer
    trainer.model.detach()  # the digest is W_0's
    described["backbone"] = trainer.model.backbone.digest
    described["partition"] = trainer.data.partition_digest
    described["classes"] = trainer.data.classes
    sizes = trainer.data.partition.sizes
    hosted = np.arange(len(sizes))
    if config.clients.count == 0:
        hosted = hosted[[int(context.node_config["partition-id"])]]
    return MetricRecord(
        {"clients": hosted.tolist(), "examples": sizes[hosted].tolist()}
    )


def _describe_own_data(
    config: RunConfig, context: Context, described: ConfigRecord
) -> MetricRecord:
    """Give counts and label names, which is all that leaves the node of its data."""
    source = OwnData.of(context.node_config, config.data)
    texts, skipped = source.load()
    labels = source.labels(texts)
    if not labels:
        rows = ", ".join(f"{n} {reason}" for reason, n in skipped.items())
        raise OwnDataError(f"no usable row; skipped: {rows or 'none'}")
    described["backbone"] = digest_of(config.model)
    described["name"] = _name(context)
    described["labels"] = list(labels)
    if "partition-id" in context.node_config:
        described["client"] = int(context.node_config["partition-id"])
    metrics = MetricRecord({"examples": list(labels.values())})
    if skipped:  # Flower cannot count the bytes of an empty list
        described["skipped"] = list(skipped)
        metrics["skipped"] = list(skipped.values())
    return metrics


def _name(context: Context) -> str:
    return str(context.node_config.get("name", context.node_id))


@_with_known_errors
def train(message: Message, context: Context) -> Message:
    """Train some clients one after the other, and fold their updates into one."""
    instruction = Instruction.read(message.content)
    release(message)
    process = get_process(context, instruction)
    trainer = process.trainer
    state = _enter(process, instruction)
    phase = trainer.schedule[instruction.phase]
    head = trainer.model.backbone.head_size
    aggregator = make_aggregator(phase, trainer.config, head)
    fold = aggregator.make_fold()
    report = Report(
        instruction.server_round,
        instruction.phase,
        instruction.fingerprint,
        pack({}),
        clients=[],
        examples=[],
        losses=[],
        seconds=[],
        payloads=[],
        wire=count_wire(str(context.node_config.get("wire-interface", ""))),
    )
    sender = Sender(trainer, context, instruction)
    alone = pack({})
    for client in instruction.clients:
        started = time.perf_counter()
        try:
            turn = trainer.train_client(client, state, phase, instruction.server_round)
            upload = sender.code(client, turn.update, state)
            fold.add(upload.update, turn.examples, client)
        except (ClientError, FoldError) as error:
            report.failures[client] = str(error)
            continue
        report.clients.append(client)
        report.examples.append(turn.examples)
        report.losses.append(turn.loss)
        sender.keep(client, upload)
        alone = upload.array
        report.payloads.append(len(alone.data))
        report.seconds.append(time.perf_counter() - started)
    if not report.clients:
        reasons = "; ".join(f"client {c}: {r}" for c, r in report.failures.items())
        return Message(Error(0, reasons), reply_to=message)
    # One coded update is less than an eighth of its exact sums.
    report.update = alone if len(report.clients) == 1 else fold.packed()
    return Message(report.content(), reply_to=message)


@_with_known_errors
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate a state on the held-out examples of some clients."""
    instruction = Instruction.read(message.content)
    release(message)
    process = get_process(context, instruction)
    state = _enter(process, instruction)
    results = [process.trainer.evaluate_client(c, state) for c in instruction.clients]
    found = [result for result in results if result is not None]
    content = write_evaluation(pool(found) if found else None)
    return Message(content, reply_to=message)


HANDLERS: dict[str, Handler] = {"query": query, "train": train, "evaluate": evaluate}


def _enter(process: ClientProcess, instruction: Instruction) -> State:
    """Attach what the instruction is for, and complete the state it brings."""
    trainer = process.trainer
    model, phase = trainer.model, trainer.schedule[instruction.phase]
    if not model.is_attached(phase, instruction.base):
        delta = instruction.base_delta
        if delta.weights is not None:
            weights = unpack(delta.weights, model.target_shapes)
            model.attach(phase, BaseWeights(weights=weights), instruction.base)
        else:
            if not model.is_attached(phase, delta.known):
                start = _base(trainer, instruction) if delta.known else None
                model.attach(phase, start, delta.known)
            if delta.changes:
                changes = [_read_change(model, packed) for packed in delta.changes]
                model.change_base(changes, delta.version + 1, instruction.base)
    adapter = model.attach(phase, None, instruction.base)
    adapter.begin(instruction.phase_round)
    if adapter.fingerprint() != instruction.fingerprint:
        raise MismatchError(
            f"the {phase.adapter} adapter of this node has fingerprint "
            f"{adapter.fingerprint()}, the server's {instruction.fingerprint}: their "
            "masks or backbones differ"
        )
    return adapter.complete(_read_state(process, adapter.sent(), instruction))


def _read_state(
    process: ClientProcess, layout: dict[str, Size], instruction: Instruction
) -> State:
    """Read what a client is sent of the state."""
    trainer = process.trainer
    adapter = trainer.schedule[instruction.phase].adapter_type
    if rank_of := adapter.client_ranks(trainer.config):
        largest = max(map(rank_of, instruction.clients))
        sent = unpack(instruction.state, rank_shapes(layout, largest))
        return fill_slices(sent, layout)
    codec = Codec.of_download(trainer.config.download, trainer.model.backbone.head_size)
    if not codec.lossless:
        return add(codec.decode(instruction.state, layout), trainer.model.reference)
    known = b""
    if instruction.since:
        if instruction.since not in process.received:
            raise MissingStateError(f"no state {instruction.since} here")
        known = process.received[instruction.since]
    count = sum(shape.numel() for shape in layout.values())
    data = codec.open(instruction.state, count, known)
    process.receive(name_version(data), data)
    return add(codec.read(data, layout), trainer.model.reference)


def _read_change(model: AttachedModel, packed: Array) -> State:
    return unpack(packed, model.change_shapes(len(packed.data) // 4))


def _base(trainer: Trainer, instruction: Instruction) -> BaseWeights:
    """Take the phase's first base from the message, or from this machine's cache."""
    known, sent = instruction.base_delta.known, instruction.base_delta.start
    # Through bytes, so that what came over the network cannot be a path.
    path = cache_folder() / f"base-{bytes.fromhex(known).hex()}"
    codec = Codec.of_download(trainer.config.download, head=0)
    if sent is None and not path.is_file():
        raise MissingBaseError(f"no base {known} here")
    data = path.read_bytes() if sent is None else sent.data
    if blake2b(data, digest_size=16).hexdigest() != known:
        if sent is None:
            raise MissingBaseError(f"base {known} is damaged here")
        raise MismatchError("the base that was sent does not have its digest")
    if sent is not None:
        write_atomically(path, data)
    rounds_before = instruction.server_round - instruction.phase_round
    phase = trainer.schedule[instruction.phase]
    shapes, positions, scaling = phase.adapter_type.base_layout(
        phase,
        trainer.config,
        trainer.model.backbone,
        rounds_before,
    )
    size = sum(prod(shape) for shape in shapes.values())
    change = codec.decode(Array(codec.dtype, (size,), codec.stype, data), shapes)
    reference = {} if codec.is_exact else trainer.model.known_values(positions)
    return BaseWeights.from_state(add(change, reference), positions, scaling)
