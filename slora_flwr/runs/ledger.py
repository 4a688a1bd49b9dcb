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
        The round's number, from 1.
    phase : str
        The adapter's name.
    direction : str
        `up`, to the server, or `down`.
    clients : int
        Number of clients that sent or received something.
    payload_bytes : int
        Bytes of the tensors, counted as if each client were a node of its own. They do
        not depend on the number of nodes.
    message_bytes : int
        Bytes of the serialised messages that were actually sent, one for each node.
    planned_payload_bytes : int or None
        Prediction of `slora plan` for training messages, without compression, if the
        whole cohort answers and no evaluation on clients has sent a part of the base
        before. None for evaluations.
    wire_bytes : int or None
        Bytes on the nodes' network interfaces since they last trained, with all
        traffic: the reply of then and this instruction. None if no node counts them.
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
        """Return the entry in a row of the CSV file."""
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
    """Entries in memory, each also appended to a CSV file.

    Parameters
    ----------
    path : Path
        The file.
    size : int or None
        Bytes to truncate an existing file to; None for a new file.
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
        """Return the `payload` or `message` bytes of a direction, in a phase or all."""
        return sum(
            getattr(entry, f"{unit}_bytes")
            for entry in self.entries
            if entry.direction == direction and phase in (None, entry.phase)
        )


def _row(values: Iterable[Any]) -> str:
    row = StringIO(newline="")
    csv.writer(row).writerow(values)
    return row.getvalue()
