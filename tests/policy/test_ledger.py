"""What all runs together use: counted before it is used, whoever is killed."""

import multiprocessing
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slora_flwr.policy.audit import append
from slora_flwr.policy.ledger import (
    NAME,
    Ledger,
    total_bytes,
    total_epsilon,
    total_seconds,
)
from slora_flwr.policy.policy import Most, PolicyFileError
from slora_flwr.policy.rules import PolicyError
from slora_flwr.privacy.accountant import Release
from tests.support.policy import by_hand

SPENT = "too little is left of what all runs together may use; allowed: "


def test_bytes_of_all_runs_add_up(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, Most(bytes=100))
    ledger.add_bytes(1, 60)
    # Another process, after a restart.
    ledger = Ledger(tmp_path, Most(bytes=100))
    ledger.add_bytes(2, 39)
    ledger.check()
    with pytest.raises(PolicyError, match=f"{SPENT}100 in all"):
        ledger.add_bytes(2, 2)
    assert {run: used.bytes for run, used in ledger.runs().items()} == {
        "1": 60,
        "2": 39,
    }
    ledger.add_bytes(3, 1)
    with pytest.raises(PolicyError, match=r"most\.bytes"):
        ledger.check()
    assert total_bytes(ledger.runs()) == 100


def test_seconds_are_reserved_and_settled(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, Most(seconds=100.0))
    first, granted = ledger.reserve(1, 80.0)
    assert granted == 80
    second, granted = ledger.reserve(2, 80.0)
    assert granted == 20
    with pytest.raises(PolicyError, match=f"{SPENT}100 in all"):
        ledger.reserve(3, 1.0)
    ledger.settle(1, first, 30.0)
    ledger.settle(2, second, 20.0)
    assert total_seconds(ledger.runs()) == 50
    assert ledger.reserve(3, 80.0)[1] == 50
    with pytest.raises(PolicyError, match=r"most\.seconds"):
        ledger.check()


def test_what_a_killed_node_had_reserved_stays(tmp_path: Path) -> None:
    """It trained, and nobody knows for how long."""
    code = "import os, signal, sys; from pathlib import Path; "
    code += "from slora_flwr.policy.ledger import Ledger; "
    code += "from slora_flwr.policy.policy import Most; "
    code += "Ledger(Path(sys.argv[1]), Most()).reserve(1, 40.0); "
    code += "os.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert done.returncode == -signal.SIGKILL
    ledger = Ledger(tmp_path, Most(seconds=100.0))
    assert ledger.reserve(2, 80.0)[1] == 60


def test_epsilon_is_that_of_all_runs_at_the_policys_delta(tmp_path: Path) -> None:
    """Two runs of two steps each are as one of four."""
    spent = by_hand(4.0, 4, 1e-6)
    most = Most(epsilon=1.02 * spent, delta=1e-6)
    ledger = Ledger(tmp_path, most)
    ledger.add_release(1, Release(1.0, 4.0, 2))
    ledger.check()
    ledger.add_release(2, Release(1.0, 4.0, 2))
    assert total_epsilon(ledger.runs(), most) == pytest.approx(spent, rel=0.01)
    assert by_hand(4.0, 2, 1e-6) < 0.8 * spent
    with pytest.raises(PolicyError, match=r"most\.epsilon .* in all"):
        ledger.add_release(3, Release(1.0, 4.0, 2))
    assert len(ledger.runs()) == 2
    strict = Ledger(tmp_path, Most(epsilon=0.9 * spent, delta=1e-6))
    with pytest.raises(PolicyError, match=r"most\.epsilon"):
        strict.check()


def _count(folder: Path, run: int) -> None:
    ledger = Ledger(folder, Most())
    for _ in range(20):
        ledger.add_bytes(run, 1)


def test_processes_take_turns(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    started = [spawn.Process(target=_count, args=(tmp_path, n)) for n in (1, 2, 3)]
    for process in started:
        process.start()
    for process in started:
        process.join()
        assert process.exitcode == 0
    runs = Ledger(tmp_path, Most()).runs()
    assert {run: used.bytes for run, used in runs.items()} == {
        "1": 20,
        "2": 20,
        "3": 20,
    }


def test_a_ledger_that_is_gone_or_broken_is_no_new_one(tmp_path: Path) -> None:
    Ledger(tmp_path, Most()).add_bytes(1, 5)
    append(tmp_path, {"event": "answered"})
    kept = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).unlink()
    with pytest.raises(PolicyFileError, match=NAME):
        Ledger(tmp_path, Most())
    for broken in (b"", kept[:-3], b'{"1": {"bytes": -1}}', b"[]"):
        (tmp_path / NAME).write_bytes(broken)
        with pytest.raises(PolicyFileError, match="cannot be read"):
            Ledger(tmp_path, Most()).check()


def test_a_folder_that_is_a_file_refuses_all(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    with pytest.raises(PolicyFileError, match="cannot be written"):
        Ledger(tmp_path / "state", Most())
