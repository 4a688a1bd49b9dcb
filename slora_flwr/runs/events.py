"""What happened in a run: the events of events.jsonl, for their writer and readers."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

EVENTS = "events.jsonl"
METRICS = ("loss", "accuracy", "macro_f1", "majority_accuracy")


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened in a run, written as one line.

    Attributes
    ----------
    seconds : float
        From the run's start to the line.
    """

    kind: ClassVar[str]
    seconds: float = 0.0

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> Self:
        """Return the event of a line, of which unknown facts are left out.

        Raises
        ------
        TypeError
            If a fact is missing.
        """
        names = [f.name for f in fields(cls)]
        return cls(**{name: facts[name] for name in names if name in facts})


@dataclass(frozen=True)
class ClientRecord:
    """One client's part in a round: its examples, mean loss and seconds."""

    examples: int
    loss: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RecordedRound(Event):
    """A round that was closed.

    Attributes
    ----------
    phase : str
        The adapter's name.
    cohort : list[int]
        Clients that were asked.
    clients : dict[int, ClientRecord]
        Those whose updates are in the aggregate.
    round : int
        From 1.
    replied : int
        Number of `clients`.
    train_loss : float
        Mean over clients, weighted by examples.
    payload_bytes : int
        Sent since the run's start, both directions.
    metrics : dict[str, float]
        `accuracy`, `macro_f1`, … of the new state, with `client_` before those that
        clients measured beside the server; empty where it was not evaluated.
    kept_energy : float or None
        Share of what an open phase has learned that a handoff would keep now.
    epsilon : float or None
        What all rounds so far have spent, where privacy is on.
    """

    kind = "round"
    phase: str
    cohort: list[int]
    clients: dict[int, ClientRecord]
    round: int
    replied: int
    train_loss: float
    payload_bytes: int
    metrics: dict[str, float] = field(default_factory=dict)
    kept_energy: float | None = None
    epsilon: float | None = None

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> Self:
        """Return the round of a line; see `Event.read`."""
        clients = {
            int(client): ClientRecord(did["examples"], did["loss"], did["seconds"])
            for client, did in facts["clients"].items()
        }
        names = [*METRICS, *(f"client_{name}" for name in METRICS)]
        metrics = {n: facts[n] for n in names if facts.get(n) is not None}
        read = {"replied": len(clients), "clients": clients, "metrics": metrics}
        return super().read({**facts, **read})


@dataclass(frozen=True, kw_only=True)
class Handover(Event):
    """A phase was primed by the one before it.

    Attributes
    ----------
    base : str
        `lora.base`.
    energies : dict[str, float]
        Share of each matrix's squared norm that the rank keeps.
    took : float
        Seconds.
    """

    kind = "handoff"
    base: str
    energies: dict[str, float]
    took: float


@dataclass(frozen=True, kw_only=True)
class ClientsFailed(Event):
    """A node's clients were left out of a round."""

    kind = "failure"
    round: int
    node: int
    clients: list[int]
    reason: str


@dataclass(frozen=True, kw_only=True)
class NodeLeftOut(Event):
    """A node was left out of the run, until it answers another query."""

    kind = "left_out"
    node: int
    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class NodeJoined(Event):
    """A node with data of its own takes part.

    Attributes
    ----------
    node, client : int
        Its id, and its client's.
    name : str
        What its operator calls it.
    examples : int
        Its rows that are trained on.
    skipped : dict[str, int]
        How many rows are not, by reason.
    unknown_labels : list[str]
        Labels of its rows that are not among the run's.
    """

    kind = "node"
    node: int
    name: str
    client: int
    examples: int
    skipped: dict[str, int]
    unknown_labels: list[str]


@dataclass(frozen=True, kw_only=True)
class Resumed(Event):
    """The run goes on after a round, as Flower's run of that id."""

    kind = "resumed"
    round: int
    run: str


@dataclass(frozen=True, kw_only=True)
class Stopped(Event):
    """The run ended before its last round."""

    kind = "stopped"
    reason: str


_KINDS: dict[str, type[Event]] = {
    event.kind: event
    for event in (
        RecordedRound,
        Handover,
        ClientsFailed,
        NodeLeftOut,
        NodeJoined,
        Resumed,
        Stopped,
    )
}


def to_line(event: Event) -> str:
    """Return an event as JSON on one line: its kind, then its facts in order."""
    facts: dict[str, Any] = {"event": event.kind}
    for name, value in asdict(event).items():
        if name == "metrics":
            facts |= value
        elif value is not None:
            facts[name] = value
    return json.dumps(facts) + "\n"


def read_events(path: Path) -> list[Event]:
    """Return the events of a file that this version knows, in order.

    Raises
    ------
    ValueError, KeyError, TypeError
        If a line is none that was written.
    """
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    # A run that was killed, or is under way, may have written half a line.
    told = [json.loads(line) for line in lines if line.endswith("\n")]
    return [
        _KINDS[facts["event"]].read(facts) for facts in told if facts["event"] in _KINDS
    ]
