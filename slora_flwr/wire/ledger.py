"""The ledger: bytes by round, phase and direction."""

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """One direction of one round.

    Attributes
    ----------
    round : int
        From 1.
    phase : str
        The adapter's name.
    direction : str
        `up`, to the server, or `down`.
    clients : int
        Clients that sent or were sent something.
    payload_bytes : int
        Bytes of the tensors, counted once for each client, as if each were a node of
        its own: the same for any number of nodes.
    message_bytes : int
        Bytes of the serialised messages that were really sent, one for each node.
    planned_payload_bytes : int or None
        What `slora plan` predicts for training messages if the whole cohort answers
        and no evaluation on clients has brought a part of the base before, without
        compression; None for an evaluation's own.
    wire_bytes : int or None
        Bytes that the nodes' network interfaces moved since they trained last, all
        traffic included: that reply and this instruction. None where no node counts
        them.
    """

    round: int
    phase: str
    direction: str
    clients: int
    payload_bytes: int
    message_bytes: int
    planned_payload_bytes: int | None = None
    wire_bytes: int | None = None


class Ledger:
    """Entries in memory and, as they come, in a CSV file.

    Parameters
    ----------
    path : Path
        The file, made anew.
    """

    def __init__(self, path: Path) -> None:
        self.entries: list[Entry] = []
        self._path = path
        names = [f.name for f in fields(Entry)]
        with path.open("w", newline="") as file:
            csv.DictWriter(file, names).writeheader()

    def add(self, entry: Entry) -> None:
        """Append an entry."""
        self.entries.append(entry)
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, list(asdict(entry))).writerow(asdict(entry))

    def total(self, unit: str, direction: str, phase: str | None = None) -> int:
        """Sum `payload` or `message` bytes of a direction, of one phase or of all."""
        return sum(
            getattr(entry, f"{unit}_bytes")
            for entry in self.entries
            if entry.direction == direction and phase in (None, entry.phase)
        )
