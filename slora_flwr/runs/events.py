"""The events of a run, as events.jsonl holds them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from slora_flwr.common.facts import Count, Figure, check
from slora_flwr.common.files import read_regular

EVENTS = "events.jsonl"
# The reason of a `Stopped` that is no failure.
INTERRUPTED = "interrupted"
METRICS = (
    "loss",
    "accuracy",
    "macro_f1",
    "majority_accuracy",
    "perplexity",
    "exact_match",
    "rouge_l",
    "choice_accuracy",
)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened in a run: one line of events.jsonl.

    Attributes
    ----------
    seconds : float
        Seconds from the run's start until the line was written.
    """

    kind: ClassVar[str]
    seconds: Figure = 0.0

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> Self:
        """Return the event in a line; unknown facts are ignored.

        Raises
        ------
        ValueError
            If the line lacks a fact, or one is impossible.
        """
        return check(cls, facts)


@dataclass(frozen=True)
class ClientRecord:
    """One client's part in a round: its weight, mean loss and seconds.

    The weight is its examples or, with `clients.weight` `tokens`, its learned tokens.
    """

    examples: Count
    loss: Figure
    seconds: Figure


@dataclass(frozen=True)
class ClassRecord:
    """What the server predicted of its own test examples, by class.

    Attributes
    ----------
    right, predicted, labels : list[int]
        Numbers of right predictions, predictions and examples, by class id.
    confused : list[tuple[int, int, int]]
        Label, prediction and number of examples of the commonest errors, from the most
        frequent; all errors if `is_whole`.
    """

    right: list[Count]
    predicted: list[Count]
    labels: list[Count]
    confused: list[tuple[Count, Count, Count]]

    def __post_init__(self) -> None:
        classes = len(self.labels)
        known = all(max(pair[:2]) < classes for pair in self.confused)
        if not len(self.right) == len(self.predicted) == classes or not known:
            raise ValueError("not of the same classes")

    @property
    def is_whole(self) -> bool:
        """Whether `confused` has all errors."""
        errors = sum(number for _, _, number in self.confused)
        return errors == sum(self.labels) - sum(self.right)


@dataclass(frozen=True, kw_only=True)
class RecordedRound(Event):
    """A round that was closed.

    Attributes
    ----------
    phase : str
        The adapter's name.
    cohort : list[int]
        The clients that were asked to train.
    clients : dict[int, ClientRecord]
        The clients whose updates are in the aggregate.
    round : int
        The round's number, from 1.
    replied : int
        Number of `clients`.
    train_loss : float or None
        Mean loss over clients, weighted by examples; None without any.
    payload_bytes : int
        Bytes sent since the run's start, both directions.
    metrics : dict[str, float]
        `accuracy`, `macro_f1`, … of the averaged state. If both sides evaluated it,
        names of the clients' metrics begin with `client_`. Those of the last state, if
        evaluated, begin with `plain_`. Empty without an evaluation. Metrics that are
        not finite are left out.
    kept_energy : float or None
        In an open phase, the share of the learned delta that a handoff would keep now.
    epsilon : float or None
        With privacy, the epsilon spent so far.
    classes : ClassRecord or None
        In the last round, what the averaged state predicts of the server's test data;
        None without such data.
    """

    kind = "round"
    phase: str
    cohort: list[int]
    clients: dict[int, ClientRecord]
    round: Count
    replied: Count
    train_loss: Figure | None = None
    payload_bytes: Count
    metrics: dict[str, Figure] = field(default_factory=dict)
    kept_energy: Figure | None = None
    epsilon: Figure | None = None
    classes: ClassRecord | None = None

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> Self:
        """Return the round in a line; see `Event.read`."""
        clients = facts.get("clients")
        replied = len(clients) if isinstance(clients, dict) else 0
        names = [
            f"{p}{c}{n}"
            for p in ("", "plain_")
            for c in ("", "client_")
            for n in METRICS
        ]
        metrics = {n: facts[n] for n in names if facts.get(n) is not None}
        return super().read({**facts, "replied": replied, "metrics": metrics})


@dataclass(frozen=True, kw_only=True)
class HandedOff(Event):
    """A phase primed the next one.

    Attributes
    ----------
    base : str
        The run's `lora.base`.
    energies : dict[str, float]
        By target matrix, the share of the delta's squared norm that the rank keeps.
    took : float
        Seconds that the handoff took.
    """

    kind = "handoff"
    base: str
    energies: dict[str, Figure]
    took: Figure


@dataclass(frozen=True, kw_only=True)
class ClientsFailed(Event):
    """Clients of a node were left out of a round."""

    kind = "failure"
    round: Count
    node: int
    name: str | None = None  # not in older files
    clients: list[int]
    reason: str


@dataclass(frozen=True, kw_only=True)
class NodeEvaluated(Event):
    """What a node says of a round's state on its held-out examples."""

    kind = "evaluation"
    round: Count
    node: int
    name: str | None = None  # not in older files
    examples: Count
    loss: Figure
    accuracy: Figure


@dataclass(frozen=True, kw_only=True)
class NodeLeftOut(Event):
    """A node was left out, for the reason and the time that `reason` says."""

    kind = "left_out"
    node: int
    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class NodeVersion(Event):
    """A node has another version of slora-flwr installed than the server."""

    kind = "version"
    node: int
    name: str
    version: str
    server: str


@dataclass(frozen=True, kw_only=True)
class NodePrecision(Event):
    """A node computes in another precision than the server."""

    kind = "precision"
    node: int
    name: str
    precision: str
    server: str


@dataclass(frozen=True, kw_only=True)
class NodeJoined(Event):
    """A node that trains on its own data joined the run.

    Attributes
    ----------
    node, client : int
        The ids of the node and of its client.
    name : str
        The name that the node is registered under, or that its operator chose.
    examples : int
        Number of usable rows.
    skipped : dict[str, int]
        Number of other rows, by reason.
    unknown_labels : list[str]
        Labels of the node's rows that are not among the run's.
    """

    kind = "node"
    node: int
    name: str
    client: int
    examples: Count
    skipped: dict[str, Count]
    unknown_labels: list[str]


@dataclass(frozen=True, kw_only=True)
class Resumed(Event):
    """The run was resumed after a round; `run` is the id of the new Flower run."""

    kind = "resumed"
    round: Count
    run: str


@dataclass(frozen=True, kw_only=True)
class Stopped(Event):
    """The run stopped before its last round."""

    kind = "stopped"
    reason: str


@dataclass(frozen=True, kw_only=True)
class Unreadable(Event):
    """A line that is no JSON, since a crash cut it or filled it with zeros."""

    kind = "unreadable"


_KINDS: dict[str, type[Event]] = {
    event.kind: event
    for event in (
        RecordedRound,
        HandedOff,
        ClientsFailed,
        NodeEvaluated,
        NodeLeftOut,
        NodePrecision,
        NodeVersion,
        NodeJoined,
        Resumed,
        Stopped,
    )
}


def to_line(event: Event) -> str:
    """Return an event as a line of JSON: its kind, then its facts in order."""
    facts: dict[str, Any] = {"event": event.kind}
    for name, value in asdict(event).items():
        if name == "metrics":
            facts |= value
        elif value is not None:
            facts[name] = value
    return json.dumps(facts, allow_nan=False) + "\n"


def read_events(path: Path) -> list[Event]:
    """Return the events in a file, in order; events of unknown kinds are ignored.

    Raises
    ------
    OSError
        If it is not a regular file, or cannot be read.
    ValueError
        If a line is JSON and not an event.
    """
    if not path.exists():
        return []
    *lines, rest = read_regular(path).split(b"\n")
    # A run that was killed or is still going may have written half a line.
    if b"\0" in rest:
        lines.append(rest)
    events: list[Event] = []
    for number, line in enumerate(lines, start=1):
        try:
            event = read_line(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if event is not None:
            events.append(event)
    return events


def read_line(line: bytes) -> Event | None:
    """Return the event in a line; None if it is of an unknown kind.

    Raises
    ------
    ValueError
        If it is JSON and not an event.
    """
    try:
        facts = read_json(line)
    except ValueError:
        return Unreadable()
    kind = check(_Line, facts).event
    return _KINDS[kind].read(facts) if kind in _KINDS else None


@dataclass(frozen=True)
class _Line:
    event: str


def read_json(data: bytes) -> Any:
    """Return the value in a JSON text.

    Raises
    ------
    ValueError
        If it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=_no_figure)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_figure(constant: str) -> None:
    """Return None for the NaN or infinity of an older version, which is no JSON."""
