"""The ledger: bytes by round, phase and direction."""

import csv
import os
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, astuple, dataclass, fields
from io import StringIO
from pathlib import Path
from typing import Any

from slora_flwr.common.facts import Count, check_cells
from slora_flwr.common.files import append, read_regular

LEDGER = "ledger.csv"


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

    round: Count
    phase: str
    direction: str
    clients: Count
    payload_bytes: Count
    message_bytes: Count
    planned_payload_bytes: Count | None = None
    wire_bytes: Count | None = None

    @classmethod
    def read(cls, row: Mapping[str, str]) -> "Entry":
        """Return the entry in a row of the CSV file.

        Raises
        ------
        ValueError
            If the row lacks a cell, or one is impossible.
        """
        cells = {f.name: row[f.name] for f in fields(cls) if row.get(f.name)}
        if planned := cells.get("planned_payload_bytes"):
            # An older version wrote fractions.
            cells["planned_payload_bytes"] = planned.partition(".")[0]
        return check_cells(cls, cells)


NAMES = [f.name for f in fields(Entry)]
_NEEDED = {f.name for f in fields(Entry) if f.default is MISSING}


def read_entries(path: Path, size: int | None = None) -> list[Entry]:
    """Return the entries in a ledger, without a last line that is half-written.

    Parameters
    ----------
    path : Path
        The file.
    size : int or None
        Number of its bytes to read; None for all.

    Raises
    ------
    OSError
        If it is not a regular file, or cannot be read.
    ValueError
        If it has no header, or a line is not an entry.
    """
    text, end, _ = read_regular(path)[:size].decode("utf-8-sig").rpartition("\n")
    rows = csv.DictReader(StringIO(text + end, newline=""))
    entries = []
    try:
        if _NEEDED - {*(rows.fieldnames or ())}:
            raise ValueError(f"it is not the header, {','.join(NAMES)}")
        for row in rows:
            entries.append(Entry.read(row))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"line {rows.line_num or 1}: {error}") from None
    return entries


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
            append(path, _row(NAMES))
        else:
            os.truncate(path, size)
            self.entries = read_entries(path)

    def add(self, entry: Entry) -> None:
        """Append an entry; write all of them if the file is gone."""
        self.entries.append(entry)
        if self._path.exists():
            append(self._path, _row(astuple(entry)))
        else:
            append(self._path, "".join(map(_row, [NAMES, *map(astuple, self.entries)])))

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
