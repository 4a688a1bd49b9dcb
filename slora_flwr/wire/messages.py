"""The contents of messages between server and nodes, as Flower records."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.common.serde import message_to_proto

from slora_flwr.common.text import printable
from slora_flwr.data.node_files import LONGEST_LABEL, MOST_LABELS
from slora_flwr.tasks.base import Evaluation, Task
from slora_flwr.wire.packing import pack

# Error codes of a node that lacks the base that an instruction names, or the state that
# the instruction's is a difference from.
MISSING_BASE, MISSING_STATE = 2404, 2405
# Error code of the server itself, in place of a reply that cannot be read.
UNREADABLE = 2406
# Type of the message that tells a node that the run has ended.
END = f"{MessageType.QUERY}.end"


class MessageError(ValueError):
    """A message whose records are invalid."""


@dataclass
class BaseDelta:
    """The difference from the base that a node has to the base of an instruction.

    Attributes
    ----------
    known : str
        Digest of the version of the base at which the changes begin; empty for W_0.
    version : int
        Its number: how many rounds of the phase have changed it.
    start : Array or None
        That version, packed, for a node that has none; it is the phase's first.
    changes : list[Array]
        The changes of the rounds since, one each.
    weights : Array or None
        The target matrices of the base, in place of all the above.
    """

    known: str = ""
    version: int = 0
    start: Array | None = None
    changes: list[Array] = field(default_factory=list)
    weights: Array | None = None


@dataclass
class Instruction:
    """What the server asks a node to do with some of its clients.

    Attributes
    ----------
    server_round, phase, phase_round : int
        The round from 1, the index of its phase, and the round within the phase, from
        1; 0 before the phase's first.
    clients : list[int]
        Client ids.
    classes : list[str]
        The agreed label names if nodes train on their own data; otherwise none.
    fingerprint : str
        Digest of the adapter's layout and mask. The mask follows from the run's seed.
    state : Array
        The coded state to start from.
    base : str
        Digest of the phase's base, empty for W_0.
    base_delta : BaseDelta
        What the node lacks of the base.
    since : str
        Digest of the state that `state` is a difference from; empty if it is whole.
    lineage : int
        Names the run across interruptions, if clients keep residuals.
    residuals : list[int]
        For each client, its last round that counted, whose residual its next update
        adds; 0 for none. Empty if clients keep none.
    letters : dict[int, bytes]
        With secure aggregation, sealed shares from the node's neighbours, by number.
    """

    server_round: int
    phase: int
    clients: list[int]
    fingerprint: str
    state: Array
    base: str = ""
    classes: list[str] = field(default_factory=list)
    phase_round: int = 1
    base_delta: BaseDelta = field(default_factory=BaseDelta)
    since: str = ""
    lineage: int = 0
    residuals: list[int] = field(default_factory=list)
    letters: dict[int, bytes] = field(default_factory=dict)

    def content(self) -> RecordDict:
        """Return the records."""
        arrays = ArrayRecord({"state": self.state})
        delta = self.base_delta
        if delta.start is not None:
            arrays["base"] = delta.start
        if delta.weights is not None:
            arrays["weights"] = delta.weights
        for i, change in enumerate(delta.changes):
            arrays[f"move-{i}"] = change
        config = ConfigRecord(
            {
                "server-round": self.server_round,
                "phase": self.phase,
                "phase-round": self.phase_round,
                "clients": self.clients,
                "fingerprint": self.fingerprint,
                "version": delta.version,
                "moves": len(delta.changes),
            }
        )
        if self.base:  # Flower cannot count the bytes of an empty string
            config["base"] = self.base
        if delta.known:
            config["known"] = delta.known
        if self.since:
            config["since"] = self.since
        if self.classes:
            config["classes"] = self.classes
        if self.residuals:
            config["lineage"] = str(self.lineage)  # it can be beyond 63 bits
            config["residuals"] = self.residuals
        if self.letters:
            config["writers"] = [*self.letters]
            config["letters"] = [*self.letters.values()]
        return RecordDict({"arrays": arrays, "config": config})

    @classmethod
    def read(cls, content: RecordDict) -> "Instruction":
        """Return the instruction in some records.

        Raises
        ------
        MessageError
            If a record or an entry is missing or invalid.
        """
        try:
            arrays = content.array_records["arrays"]
            config: Mapping[str, Any] = content.config_records["config"]
            return cls(
                server_round=read_number(config["server-round"]),
                phase=read_number(config["phase"]),
                phase_round=read_number(config["phase-round"]),
                clients=_clients(config["clients"]),
                fingerprint=_digest(config["fingerprint"]),
                state=arrays["state"],
                base=_digest(config.get("base", "")),
                base_delta=BaseDelta(
                    known=_digest(config.get("known", "")),
                    version=read_number(config["version"]),
                    start=arrays.get("base"),
                    changes=[
                        arrays[f"move-{i}"] for i in range(read_number(config["moves"]))
                    ],
                    weights=arrays.get("weights"),
                ),
                classes=_classes(config.get("classes", [])),
                since=_digest(config.get("since", "")),
                lineage=read_number(config.get("lineage", 0)),
                residuals=[*map(read_number, config.get("residuals", []))],
                letters=by_number(config.get("writers", []), config.get("letters", [])),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise MessageError(
                f"the instruction's records are off: {error!r}"
            ) from error


def read_number(given: Any) -> int:
    """Return a number from 0 to 2^64 - 1, which may be sent as text.

    Raises
    ------
    ValueError, TypeError
        If it is none. It may become a file name, so it is nothing but digits.
    """
    number = int(given)
    # Large numbers are sent as text.
    if given not in (number, str(number)) or not 0 <= number < 2**64:
        raise ValueError(f"{printable(given)} is not a number from 0 to 2^64 - 1")
    return number


def by_number(numbers: Any, values: Any) -> dict[int, bytes]:
    """Return bytes by distinct numbers, of two lists of the same length.

    Raises
    ------
    ValueError, TypeError
        If they are something else.
    """
    found = dict(zip(map(read_number, numbers), values, strict=True))
    if len(found) != len(values) or not all(type(x) is bytes for x in found.values()):
        raise ValueError("a number is given twice, or a value is no bytes")
    return found


def write_lineage(lineage: int) -> RecordDict:
    """Return the records that name a run across interruptions."""
    # It can be beyond 63 bits.
    return RecordDict({"config": ConfigRecord({"lineage": str(lineage)})})


def read_lineage(content: RecordDict) -> int:
    """Return the lineage in some records.

    Raises
    ------
    MessageError
        If there is none, or it is no number.
    """
    try:
        return read_number(content.config_records["config"]["lineage"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise MessageError(f"the message's records are off: {error!r}") from error


def _digest(given: Any) -> str:
    digest = str(given)
    if digest and not re.fullmatch("[0-9a-f]{32}", digest):
        raise ValueError(f"{printable(digest)} is not a digest")
    return digest


def _clients(given: Any) -> list[int]:
    clients = [read_number(client) for client in given]
    if len({*clients}) != len(clients):
        raise ValueError("a client is named twice")
    return clients


def _classes(given: Any) -> list[str]:
    classes = list(given)
    if not all(type(name) is str for name in classes):
        raise ValueError("a class is no text")
    longest = max(map(len, classes), default=0)
    if len(classes) > MOST_LABELS or longest > LONGEST_LABEL:
        raise ValueError(
            f"there are {len(classes)} classes of up to {longest} characters; allowed: "
            f"{MOST_LABELS} of {LONGEST_LABEL}"
        )
    return classes


@dataclass
class Report:
    """A node's answer after training: the fold of its clients' updates.

    Attributes
    ----------
    server_round, phase, fingerprint
        As in the instruction.
    update : Array
        The coded update of a single client, or what the fold packs of several.
    clients, examples, losses, seconds, payloads : list
        One entry for each client in the aggregate, in the same order. `examples` are
        their weights, up to `clients.max-weight`; `payloads` are the bytes of their
        coded updates.
    failures : dict[int, str]
        The clients that failed, with reasons.
    wire : list[int]
        Bytes that the node's network interface has received and sent so far; empty if
        the node does not count them.
    """

    server_round: int
    phase: int
    fingerprint: str
    update: Array = field(default_factory=lambda: pack({}))
    clients: list[int] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    payloads: list[int] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
    wire: list[int] = field(default_factory=list)

    def add(
        self, client: int, examples: int, loss: float, seconds: float, payload: int
    ) -> None:
        """Add the figures of a client that is in the aggregate."""
        self.clients.append(client)
        self.examples.append(examples)
        self.losses.append(loss)
        self.seconds.append(seconds)
        self.payloads.append(payload)

    def content(self) -> RecordDict:
        """Return the records."""
        metrics = MetricRecord(
            {
                "num-examples": sum(self.examples),
                "clients": self.clients,
                "examples": self.examples,
                "losses": self.losses,
                "seconds": self.seconds,
                "payloads": self.payloads,
            }
        )
        config = ConfigRecord(
            {
                "server-round": self.server_round,
                "phase": self.phase,
                "fingerprint": self.fingerprint,
            }
        )
        if self.wire:  # Flower cannot count the bytes of an empty list
            metrics["wire"] = self.wire
        if self.failures:
            config["failed"] = list(self.failures)
            config["reasons"] = list(self.failures.values())
        return RecordDict(
            {
                "arrays": ArrayRecord({"update": self.update}),
                "metrics": metrics,
                "config": config,
            }
        )

    @classmethod
    def read(cls, content: RecordDict) -> "Report":
        """Return the report in some records.

        Raises
        ------
        MessageError
            If a record or an entry is missing or invalid.
        """
        try:
            metrics = content.metric_records["metrics"]
            config = content.config_records["config"]
            return cls(
                server_round=int(config["server-round"]),  # type: ignore[arg-type]
                phase=int(config["phase"]),  # type: ignore[arg-type]
                fingerprint=str(config["fingerprint"]),
                update=content.array_records["arrays"]["update"],
                clients=list(metrics["clients"]),  # type: ignore[arg-type]
                examples=list(metrics["examples"]),  # type: ignore[arg-type]
                losses=list(metrics["losses"]),  # type: ignore[arg-type]
                seconds=list(metrics["seconds"]),  # type: ignore[arg-type]
                payloads=list(metrics["payloads"]),  # type: ignore[arg-type]
                wire=list(metrics.get("wire", [])),  # type: ignore[arg-type]
                failures=dict(
                    zip(
                        config.get("failed", []),  # type: ignore[arg-type]
                        config.get("reasons", []),  # type: ignore[arg-type]
                        strict=True,
                    )
                ),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise MessageError(f"the reply's records are off: {error!r}") from error


# Largest plausible loss, or time in seconds; larger ones would hide all others in means
# and charts.
MOST_FIGURE = 1e6


def is_figure(value: float) -> bool:
    """Return whether a loss or time is plausible."""
    return 0 <= value <= MOST_FIGURE


def write_evaluation(evaluation: Evaluation | None) -> RecordDict:
    """Return the records of an evaluation on clients' held-out examples."""
    metrics = MetricRecord({"num-examples": 0})
    if evaluation is not None:
        metrics["num-examples"] = evaluation.examples
        metrics["loss"] = evaluation.loss
        names, counts = evaluation.names, evaluation.counts.tolist()
        metrics.update(zip(names, counts, strict=True))
    return RecordDict({"metrics": metrics})


def read_evaluation(content: RecordDict, task: Task, classes: int) -> Evaluation | None:
    """Return the evaluation in some records; None if no example is held out.

    Raises
    ------
    MessageError
        If an entry is missing or implausible.
    """
    try:
        metrics = content.metric_records["metrics"]
        if metrics["num-examples"] == 0:
            return None
        loss = float(metrics["loss"])  # type: ignore[arg-type]
        found = task.read(loss, metrics, classes)
        if not is_figure(loss) or found.examples != metrics["num-examples"]:
            raise ValueError(found)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise MessageError(f"its figures are off: {error!r}") from error
    return found


def find_reply(received: Sequence[object], asked: str) -> Message:
    """Return the reply to a message among what was received for it.

    Parameters
    ----------
    received : Sequence[object]
        What Flower inflated, one or more objects, whose kinds it does not check.
    asked : str
        Id of the message.

    Raises
    ------
    MessageError
        If none is a message, or all reply to others.
    """
    messages = [given for given in received if isinstance(given, Message)]
    if not messages:
        kind = type(received[0]).__name__
        raise MessageError(f"it is of kind {kind}, not Message")
    for message in messages:
        if message.metadata.reply_to_message_id == asked:
            return message
    raise MessageError("it replies to another message")


def release(message: Message) -> None:
    """Free the arrays of a message that has been read.

    Flower's records refer to themselves, so their arrays would otherwise stay until the
    next full garbage collection, which is rare.
    """
    if message.has_content():
        for record in message.content.array_records.values():
            record.clear()


def message_bytes(message: Message) -> int:
    """Return the bytes of a serialised Flower message, metadata included."""
    return int(message_to_proto(message).ByteSize())
