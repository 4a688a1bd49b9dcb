"""The log of a node: it survives kills, and shows whatever is done to it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from slora_flwr.policy.audit import LOG, AuditError, append, read_log

HEAD = "head.json"


def write(folder: Path, count: int = 5) -> list[bytes]:
    """Write a log of some lines, and return them."""
    for number in range(count):
        append(folder, {"event": "asked", "round": number})
    return lines_of(folder)


def lines_of(folder: Path) -> list[bytes]:
    return (folder / LOG).read_bytes().split(b"\n")[:-1]


def put(folder: Path, lines: list[bytes]) -> None:
    (folder / LOG).write_bytes(b"".join(line + b"\n" for line in lines))


def verify(folder: Path) -> int:
    """Return how many lines follow one another, if nothing was done to the log."""
    return len(list(read_log(folder)))


def test_each_line_holds_the_one_before(tmp_path: Path) -> None:
    lines = write(tmp_path)
    told = [json.loads(line) for line in lines]
    digests = [hashlib.sha256(line).hexdigest() for line in lines]
    assert [entry["before"] for entry in told] == ["0" * 64, *digests[:-1]]
    assert [entry["number"] for entry in told] == [1, 2, 3, 4, 5]
    assert [digest for _, digest in read_log(tmp_path)] == digests
    head = json.loads((tmp_path / HEAD).read_text())
    assert head == {"number": 5, "digest": digests[-1]}
    assert (tmp_path / LOG).stat().st_mode & 0o777 == 0o600


def edit(lines: list[bytes], number: int) -> None:
    lines[number - 1] = lines[number - 1].replace(b"asked", b"added")


def move(lines: list[bytes], number: int) -> None:
    lines.insert(number, lines.pop(number - 1))


def put_in(lines: list[bytes], number: int) -> None:
    """Put in a line that is right by itself."""
    before = hashlib.sha256(lines[number - 2]).hexdigest() if number > 1 else "0" * 64
    entry = {"number": number, "before": before, "event": "asked"}
    lines.insert(number - 1, json.dumps(entry).encode())


def renumber(lines: list[bytes], number: int) -> None:
    """Take a line out and give the next its number and its place in the chain."""
    gone = json.loads(lines.pop(number - 1))
    entry = json.loads(lines[number - 1])
    entry |= {"number": gone["number"], "before": gone["before"]}
    lines[number - 1] = json.dumps(entry).encode()


TAMPERINGS: list[tuple[Callable[[list[bytes], int], None], int, str]] = [
    (edit, 1, "line 2 is not the one that followed line 1"),
    (edit, 3, "line 4 is not the one that followed line 3"),
    (edit, 5, "line 5 is not the last that was written, which was line 5"),
    (lambda lines, n: lines.__delitem__(n - 1), 1, "line 1 is not the one that"),
    (lambda lines, n: lines.__delitem__(n - 1), 3, "line 3 is not the one that"),
    (lambda lines, n: lines.__delitem__(n - 1), 5, "line 5 is missing"),
    (lambda lines, n: lines.__delitem__(slice(n, None)), 2, "line 3 is missing, and"),
    (lambda lines, n: lines.clear(), 0, "line 1 is missing, and all up to line 5"),
    (move, 2, "line 2 is not the one that followed line 1"),
    (move, 4, "line 4 is not the one that followed line 3"),
    (put_in, 1, "line 2 is not the one that followed line 1"),
    (put_in, 3, "line 4 is not the one that followed line 3"),
    (renumber, 3, "line 4 is not the one that followed line 3"),
    (renumber, 4, "line 5 is missing, and all up to line 5"),
    (lambda lines, n: lines.insert(n, b"noise"), 2, "line 3 cannot be read"),
    (lambda lines, n: lines.insert(n, b""), 2, "line 3 cannot be read"),
]


@pytest.mark.parametrize(("tamper", "number", "told"), TAMPERINGS)
def test_tampering_shows_where(
    tmp_path: Path,
    tamper: Callable[[list[bytes], int], None],
    number: int,
    told: str,
) -> None:
    lines = write(tmp_path)
    tamper(lines, number)
    put(tmp_path, lines)
    with pytest.raises(AuditError, match=told):
        verify(tmp_path)


def test_two_lines_more_than_were_noted_show(tmp_path: Path) -> None:
    """One more is what a kill may leave."""
    write(tmp_path, 4)
    noted = (tmp_path / HEAD).read_bytes()
    for count in (1, 2):
        append(tmp_path, {"event": "asked"})
        head = (tmp_path / HEAD).read_bytes()
        (tmp_path / HEAD).write_bytes(noted)
        if count == 1:
            assert verify(tmp_path) == 5
            append(tmp_path, {"event": "after a kill"})
            assert verify(tmp_path) == 6
            put(tmp_path, lines_of(tmp_path)[:5])
        (tmp_path / HEAD).write_bytes(head if count == 1 else noted)
    with pytest.raises(AuditError, match="line 6 is not the last"):
        verify(tmp_path)


@pytest.mark.parametrize("kept", [0, 2, 4])
def test_nothing_is_added_to_a_log_whose_end_is_missing(
    tmp_path: Path, kept: int
) -> None:
    """Or the next line would hide it."""
    lines = write(tmp_path)
    put(tmp_path, lines[:kept])
    with pytest.raises(AuditError, match=f"line {kept + 1} is missing"):
        append(tmp_path, {"event": "asked"})
    (tmp_path / LOG).unlink()
    with pytest.raises(AuditError, match="line 1 is missing"):
        append(tmp_path, {"event": "asked"})
    put(tmp_path, lines)
    (tmp_path / HEAD).unlink()
    with pytest.raises(AuditError, match="line 5 is not the last"):
        append(tmp_path, {"event": "asked"})


@pytest.mark.parametrize("torn", [b"{", b'{"number": 6, "before"', b"x" * 5000])
def test_a_line_that_a_kill_cut_short_is_noted(tmp_path: Path, torn: bytes) -> None:
    lines = write(tmp_path)
    with (tmp_path / LOG).open("ab") as file:
        file.write(torn)
    assert verify(tmp_path) == 5
    append(tmp_path, {"event": "asked"})
    assert verify(tmp_path) == 6
    assert lines_of(tmp_path)[:5] == lines
    digest = hashlib.sha256(torn).hexdigest()
    last = json.loads(lines_of(tmp_path)[5])
    assert last["torn"] == {"bytes": len(torn), "sha256": digest}


def test_a_last_line_that_was_cut_short_later_is_missing(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / LOG
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(AuditError, match="line 5 is missing"):
        verify(tmp_path)


WRITER = """
import sys
from pathlib import Path
from slora_flwr.policy.audit import append
print("ready", flush=True)
for number in range(10**6):
    append(Path(sys.argv[1]), {"event": "asked", "round": number})
    print(number, flush=True)
"""


def test_kills_lose_no_line_that_was_told(tmp_path: Path) -> None:
    """Whatever a killed process had said to be written is there."""
    told = 0
    for kill in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(3 + kill):  # the first says that it is ready
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        told += len(process.stdout.readlines()) + 2 + kill
        process.wait()
        process.stdout.close()
        written = verify(tmp_path)
        # Each of the killed may have written one more before it could say so.
        assert told <= written <= told + kill + 1
    append(tmp_path, {"event": "asked"})
    assert verify(tmp_path) == written + 1


def test_processes_take_turns(tmp_path: Path) -> None:
    code = WRITER.replace("10**6", "10")
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, tmp_path], stdout=subprocess.DEVNULL
        )
        for _ in range(3)
    ]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert verify(tmp_path) == 30


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / LOG).mkdir()
    with pytest.raises(AuditError.__base__, match="cannot be written"):  # type: ignore[arg-type]
        append(tmp_path, {"event": "asked"})
    assert os.listdir(tmp_path / LOG) == []
