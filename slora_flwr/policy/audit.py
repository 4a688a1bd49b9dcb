"""The log of what a node was asked, did and sent: lines that each hold the one before.

Each line is a JSON object with its number and the SHA-256 of the line before. A line is
on the disk before what it tells of happens. A small file beside the log names the last
line, so that lines missing at the end show.

Whoever can write the folder can write another log from its beginning. That shows only
where the digest of a line was noted elsewhere.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from slora_flwr.common.files import (
    make_folder,
    read_regular,
    sync,
    write_atomically,
)
from slora_flwr.policy.policy import PolicyFileError
from slora_flwr.runs.lock import turns

LOG, LOCK = "log.jsonl", "log.lock"
HEAD = "head.json"
# More bytes than a line has.
_LONGEST = 1 << 20


class AuditError(PolicyFileError):
    """A log that is not as it was written; the message names the line."""


@dataclass(frozen=True)
class Head:
    """The last line of a log: its number, from 1, and its digest."""

    number: int = 0
    digest: str = "0" * 64


_FILE = TypeAdapter(Head)


def append(folder: Path, entry: Mapping[str, Any]) -> None:
    """Append a line, and wait until it is on the disk.

    The rest of a line that a kill cut short is overwritten; the new line says so.

    Raises
    ------
    AuditError
        If the log does not end as it was left.
    PolicyFileError
        If it cannot be written.
    """
    try:
        make_folder(folder)
        with turns(folder / LOCK):
            _append(folder, entry)
    except OSError as error:
        raise PolicyFileError(f"{folder} cannot be written ({error})") from error


def _append(folder: Path, entry: Mapping[str, Any]) -> None:
    path = folder / LOG
    path.touch(mode=0o600)
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        start = file.seek(max(0, size - _LONGEST))
        *lines, torn = file.read().split(b"\n")
        last = Head()
        if lines:
            number = _read_line(lines[-1], "its last line").get("number")
            if not isinstance(number, int):
                raise AuditError(f"{path}: its last line has no number")
            last = Head(number, _digest(lines[-1]))
        elif start:
            raise AuditError(f"{path}: its last line is longer than any")
        _check_end(folder, last, lines[-1] if lines else b"")
        told = {"number": last.number + 1, "before": last.digest, "time": _now()}
        told |= entry
        if torn:
            told["torn"] = {"bytes": len(torn), "sha256": _digest(torn)}
        line = json.dumps(told).encode()
        file.seek(size - len(torn))
        file.write(line + b"\n")
        file.truncate()
    sync(path)
    head = _FILE.dump_json(Head(last.number + 1, _digest(line)))
    write_atomically(folder / HEAD, head, durably=True)


def read_log(folder: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each line of a log with its digest, checked against the one before.

    Raises
    ------
    AuditError
        Where a line is not what followed the line before; or at the end, if the last
        one is not the one that was written last.
    OSError
        If the log cannot be read.
    """
    last, line = Head(), b""
    with (folder / LOG).open("rb") as file, turns(folder / LOCK):
        for number, whole in enumerate(file, start=1):
            if not whole.endswith(b"\n"):
                break  # cut short by a kill; the next line will tell
            line = whole[:-1]
            entry = _read_line(line, f"line {number}")
            if entry.get("before") != last.digest or entry.get("number") != number:
                raise AuditError(
                    f"line {number} is not the one that followed line {last.number}: "
                    "one of the two was changed, put in, taken out or moved"
                )
            last = Head(number, _digest(line))
            yield entry, last.digest
        _check_end(folder, last, line)


def _check_end(folder: Path, last: Head, line: bytes) -> None:
    """Raise AuditError if a log's last line is not the one that was written last.

    A node that is killed may have written one line more than it noted.
    """
    path = folder / HEAD
    noted = Head()
    if path.exists():
        try:
            noted = _FILE.validate_json(read_regular(path))
        except ValueError as error:
            raise AuditError(f"{path} cannot be read ({error})") from error
    if noted.number > last.number:
        raise AuditError(
            f"line {last.number + 1} is missing, and all up to line {noted.number}"
        )
    before = json.loads(line).get("before") if line else ""
    if noted != last and noted != Head(last.number - 1, before):
        raise AuditError(
            f"line {last.number} is not the last that was written, which was line "
            f"{noted.number} with the digest {noted.digest}"
        )


def _read_line(line: bytes, name: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict):
        raise AuditError(f"{name} cannot be read")
    return entry


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
