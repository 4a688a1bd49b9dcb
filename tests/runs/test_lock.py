"""Two runs at once in one directory: the second is refused."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from logging import WARNING
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slora_flwr.cli import app
from slora_flwr.config import ConfigError
from slora_flwr.runs.checkpoint_files import list_checkpoints
from slora_flwr.runs.lock import is_locked, sole_use
from slora_flwr.server.run import run
from tests.support.grids import Grid
from tests.support.processes import wait_until
from tests.support.resuming import InterruptionError, StoppingGrid, content, resumed
from tests.support.runs import Config, arguments, events, make_config

SLORA = [sys.executable, "-c", "from slora_flwr.cli import app; app()"]


@pytest.fixture
def config(corpus: Path, tiny_models: dict[str, Path], tmp_path: Path) -> Config:
    # Stopped, or interrupted, long before its end.
    config = make_config(corpus, tiny_models["bert"], tmp_path / "run")
    return config | {"rounds": 100_000, "clients.per-round": 2}


@pytest.fixture
def running(config: Config) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose run has a checkpoint, and which stands still."""
    directory = Path(str(config["run.dir"]))
    process = subprocess.Popen([*SLORA, *arguments(config)])
    wait_until(lambda: process.poll() is not None or bool(list_checkpoints(directory)))
    assert process.poll() is None
    process.send_signal(signal.SIGSTOP)
    yield process
    process.kill()
    process.wait()


def test_a_directory_in_use_is_refused_until_its_process_is_killed(
    config: Config, running: subprocess.Popen[bytes]
) -> None:
    directory = Path(str(config["run.dir"]))
    before = content(directory)
    allowed = "the directory of a run that has ended"
    refusal = f"'{directory}', which another run is using; allowed: {allowed}"
    grid = Grid(config)
    with pytest.raises(ConfigError) as caught:
        run(grid, resumed(config), 1)
    assert refusal in str(caught.value)
    assert grid.queried == grid.asked == []
    # A new run is refused too, as in all folders that hold something.
    with pytest.raises(ConfigError, match="holds files of another run"):
        run(grid, config, 1)
    done = CliRunner().invoke(app, arguments(resumed(config)))
    assert (done.exit_code, refusal in done.output) == (2, True)
    assert content(directory) == before
    # Who only reads is not kept out.
    done = CliRunner().invoke(app, ["report", str(directory)])
    assert done.exit_code == 0, done.output
    running.kill()
    running.wait()
    last = len(events(directory, "round"))
    with pytest.raises(InterruptionError):
        run(StoppingGrid(config, last + 2), resumed(config), 2)
    assert events(directory, "resumed")
    assert len(events(directory, "round")) == last + 1


def test_a_run_that_failed_in_this_process_lets_go(config: Config) -> None:
    with pytest.raises(InterruptionError) as kept:
        run(StoppingGrid(config, 2), config, 1)
    with pytest.raises(InterruptionError):
        run(StoppingGrid(config, 3), resumed(config), 2)
    del kept


def test_a_look_at_the_lock_does_not_refuse_who_wants_it(tmp_path: Path) -> None:
    """`is_locked` shares it for an instant, which here lasts until a timer ends it."""
    path = tmp_path / "file"
    path.touch()
    looking = os.open(path, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    before = signal.signal(signal.SIGALRM, lambda *_: os.close(looking))
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with sole_use(path, "in use"):
            assert is_locked(path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not is_locked(path)


def test_programs_that_a_run_starts_do_not_keep_its_lock(tmp_path: Path) -> None:
    """As resident workers and Ray's processes might, which may outlive it."""
    path = tmp_path / "file"
    path.touch()
    script = (
        "import subprocess, sys, time\n"
        "from pathlib import Path\n"
        "from slora_flwr.runs.lock import sole_use\n"
        "with sole_use(Path(sys.argv[1]), 'in use'):\n"
        "    left = subprocess.Popen(['sleep', '3600'], close_fds=False)\n"
        "    print(left.pid, flush=True)\n"
        "    time.sleep(3600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    left = int(process.stdout.readline())
    try:
        with pytest.raises(ConfigError, match="in use"), sole_use(path, "in use"):
            pass
        process.kill()
        process.wait()
        os.kill(left, 0)  # it lives
        with sole_use(path, "in use"):
            pass
    finally:
        os.kill(left, signal.SIGKILL)
        process.kill()
        process.wait()


def test_a_file_system_without_locks_is_told_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level(WARNING, logger="flwr"), sole_use(tmp_path, "in use"):
        pass
    assert f"{tmp_path} cannot be locked against other runs ([Errno" in caplog.text
