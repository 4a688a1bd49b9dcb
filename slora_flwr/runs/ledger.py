"""The ledger: bytes by round, phase and direction."""

import csv
import os
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from io import StringIO
from pathlib import Path
from typing import Any

from slora_flwr.common.files import append


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

    @classmethod
    def read(cls, row: Mapping[str, str]) -> "Entry":
        """Read a row of the CSV file."""
        planned, wire = row.get("planned_payload_bytes"), row.get("wire_bytes")
        return cls(
            int(row["round"]),
            row["phase"],
            row["direction"],
            int(row["clients"]),
            int(row["payload_bytes"]),
            int(row["message_bytes"]),
            int(float(planned)) if planned else None,
            int(wire) if wire else None,
        )


class Ledger:
    """Entries in memory and, as they come, in a CSV file.

    Parameters
    ----------
    path : Path
        The file.
    size : int or None
        The file is cut back to so many bytes and goes on; None for a new one.
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        self.entries: list[Entry] = []
        self._path = path
        if size is None:
            append(path, _row(f.name for f in fields(Entry)))
        else:
            os.truncate(path, size)
            with path.open(newline="") as file:
                self.entries = [Entry.read(row) for row in csv.DictReader(file)]

    def add(self, entry: Entry) -> None:
        """Append an entry."""
        self.entries.append(entry)
        append(self._path, _row(astuple(entry)))

    def total(self, unit: str, direction: str, phase: str | None = None) -> int:
        """Sum `payload` or `message` bytes of a direction, of one phase or of all."""
        return sum(
            getattr(entry, f"{unit}_bytes")
            for entry in self.entries
            if entry.direction == direction and phase in (None, entry.phase)
        )


def _row(values: Iterable[Any]) -> str:
    row = StringIO(newline="")
    csv.writer(row).writerow(values)
    return row.getvalue()
