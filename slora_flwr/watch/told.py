"""What the page says of an event."""

from slora_flwr.common.text import counted, printable, shorten
from slora_flwr.reports.figures import first_of
from slora_flwr.reports.figures import tell as tell_metric
from slora_flwr.reports.progress import clock
from slora_flwr.runs.events import (
    ClientsFailed,
    Event,
    HandedOff,
    NodeEvaluated,
    NodeJoined,
    NodeLeftOut,
    NodePrecision,
    NodeVersion,
    RecordedRound,
    Resumed,
    Stopped,
    Unreadable,
    read_line,
)


def tell(line: bytes) -> dict[str, str]:
    """Return what a line of events.jsonl says: its kind, time and words."""
    try:
        event = read_line(line)
    except ValueError:
        event = Unreadable()
    if isinstance(event, Unreadable):
        return {"kind": event.kind, "at": "", "words": "a line cannot be read"}
    if event is None:
        return {"kind": "unknown", "at": "", "words": "an event of another version"}
    words = printable(_words(event), 600)
    return {"kind": event.kind, "at": clock(event.seconds), "words": words}


def _words(event: Event) -> str:
    match event:
        case RecordedRound():
            return _round(event)
        case HandedOff():
            return f"handoff, base {event.base}, in {event.took:.1f} s"
        case ClientsFailed():
            clients = ", ".join(map(str, shorten(event.clients)))
            return (
                f"round {event.round}: clients {clients} of node {event.node} left "
                f"out: {event.reason}"
            )
        case NodeEvaluated():
            return f"round {event.round}: node {event.node} evaluated the state"
        case NodeLeftOut():
            return f"{event.name} is left out: {event.reason}"
        case NodeVersion():
            return f"{event.name} has version {event.version}, not {event.server}"
        case NodePrecision():
            return f"{event.name} computes in {event.precision}, not {event.server}"
        case NodeJoined():
            examples = counted(event.examples, "example")
            return f"{event.name} joined with {examples}"
        case Resumed():
            return f"resumed after round {event.round}"
        case Stopped():
            return f"stopped: {event.reason}"
    return event.kind


def _round(done: RecordedRound) -> str:
    name = first_of(done.metrics)
    figure = tell_metric(name, done.metrics[name]) if done.metrics else "not evaluated"
    head = f"round {done.round} ({done.phase}): "
    if done.epsilon is not None:
        return f"{head}{figure}, epsilon {done.epsilon:.2f}"
    loss = "" if done.train_loss is None else f"loss {done.train_loss:.3f}, "
    clients = f"{done.replied} of {counted(len(done.cohort), 'client')}"
    size = f"{done.payload_bytes / 1e6:.2f} MB"
    return f"{head}{clients}, {loss}{figure}, {size}"
