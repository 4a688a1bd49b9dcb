"""Ctrl-C and `flwr stop`: runs end cleanly, say how they go on, and do."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from select import select

import psutil
import pytest
import tomli_w
from click.testing import Result
from flwr.app import Message, MessageType
from typer.testing import CliRunner

from slora_flwr.cli import app
from slora_flwr.config import flatten, parse
from slora_flwr.engines import flower, inline
from slora_flwr.runs.checkpoint import read_checkpoint, write_checkpoint
from slora_flwr.runs.checkpoint_files import list_checkpoints
from slora_flwr.runs.lock import is_locked, sole_use
from slora_flwr.runs.reader import read_run
from slora_flwr.runs.writing import RunDirectoryError
from slora_flwr.studies.study import digest_of
from slora_flwr.studies.sweep import sweep
from tests.support.grids import Grid
from tests.support.processes import wait_until
from tests.support.resuming import assert_same, content, stop
from tests.support.runs import (
    SLORA,
    Config,
    arguments,
    elsewhere,
    events,
    start,
    summary,
)
from tests.support.simulation import flower_home

ROOT = Path(__file__).parents[2]
# As many runs at once as cores: each has one thread, as the runs in this process.
CORES = os.cpu_count() or 1
SWEEP = [sys.executable, "-c", "from slora_flwr.cli import app; app()", "sweep"]


@pytest.fixture(autouse=True)
def heeds_interrupts() -> Iterator[None]:
    """A shell's background jobs ignore them, and so would what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def config(config: Config) -> Config:
    return config | SLORA | {"rounds": 4, "sparse.rounds": 2, "clients.per-round": 4}


def slora(*given: str) -> Result:
    return CliRunner().invoke(app, [*given])


def interrupt(
    config: Config,
    number: str,
    monkeypatch: pytest.MonkeyPatch,
    sent: signal.Signals = signal.SIGINT,
) -> Result:
    """Press Ctrl-C in a round of `slora run`; an empty `number` means before it."""

    class Interrupting(inline.InlineGrid):
        def _answer(self, message: Message) -> Message:
            kind, group = message.metadata.message_type, message.metadata.group_id
            if not number or (kind == MessageType.TRAIN and group == number):
                signal.raise_signal(sent)
            return super()._answer(message)

    with monkeypatch.context() as patch:
        patch.setattr(inline, "InlineGrid", Interrupting)
        return slora(*arguments(config))


# Inline


@pytest.mark.parametrize(
    ("kind", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_an_interrupted_run_says_how_it_goes_on_and_does(
    config: Config, monkeypatch: pytest.MonkeyPatch, kind: signal.Signals, status: int
) -> None:
    whole = start(config, Grid(config, nodes=2))
    config = elsewhere(config)
    directory = Path(str(config["run.dir"]))
    done = interrupt(config, "3", monkeypatch, kind)
    assert done.exit_code == status
    assert done.stderr.endswith(
        f"\nInterrupted. Go on with: slora resume {directory}\n"
    )
    assert "Traceback" not in done.output
    assert read_run(directory).state == "interrupted"
    assert [e["reason"] for e in events(directory, "stopped")] == ["interrupted"]
    done = slora("resume", str(directory))
    assert done.exit_code == 0, done.output
    assert_same(directory, whole)
    assert read_run(directory).state == "finished"


@pytest.mark.parametrize("number", ["", "1"])
def test_a_run_without_a_checkpoint_says_so(
    config: Config, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    done = interrupt(config, number, monkeypatch)
    assert done.exit_code == 130
    told = "Interrupted. It left no checkpoint, so there is nothing to resume.\n"
    assert done.stderr.endswith(told)
    assert "Traceback" not in done.output


def test_a_run_that_ends_before_its_export_goes_on(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it would count as finished, and have no model."""
    directory = Path(str(config["run.dir"]))

    def fail(*_: object) -> None:
        raise RunDirectoryError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("slora_flwr.server.run.export", fail)
        assert slora(*arguments(config)).exit_code == 1
    assert read_run(directory).state == "interrupted"
    assert slora("resume", str(directory)).exit_code == 0
    assert read_run(directory).state == "finished"
    assert (directory / "adapter" / "README.md").is_file()


# Sweeps


def run_of(base: Config, folder: Path) -> Config:
    """Return the config of a study's only run, with the directory that it has."""
    full = flatten(parse({k: v for k, v in base.items() if k != "run.dir"}))
    return full | {"run.dir": str(folder / f"some-name-{digest_of(full)}")}


def write_study(path: Path, base: Config) -> Path:
    given = {k: v for k, v in base.items() if k != "run.dir"}
    path.write_text(tomli_w.dumps({"sweep": {"processes": CORES}, "base": given}))
    return path


def test_a_sweeps_interrupted_run_goes_on(config: Config, tmp_path: Path) -> None:
    whole = start(config, Grid(config, nodes=1))
    stopped = stop(run_of(config, tmp_path), 3)
    assert sweep(write_study(tmp_path / "study.toml", config), tmp_path, True) == []
    assert [event["round"] for event in events(stopped, "resumed")] == [2]
    assert_same(stopped, whole)


def test_a_sweeps_run_of_another_protocol_begins_anew(
    config: Config, tmp_path: Path
) -> None:
    stopped = stop(run_of(config, tmp_path), 3)
    for path in list_checkpoints(stopped):
        snapshot = read_checkpoint(path)
        snapshot.facts["identity"]["protocol"] = -1
        write_checkpoint(path, snapshot)
    assert sweep(write_study(tmp_path / "study.toml", config), tmp_path) == []
    assert events(stopped, "resumed") == []
    assert summary(stopped)["rounds"] == 4


def test_a_sweeps_run_that_another_process_makes_is_left_alone(
    config: Config, tmp_path: Path
) -> None:
    """As `slora run`, which a sweep over Flower started, if the sweep is killed."""
    given = run_of(config, tmp_path)
    directory = stop(given, 1)
    assert not list_checkpoints(directory)
    before = content(directory)
    path = write_study(tmp_path / "study.toml", config)
    with sole_use(directory / "events.jsonl", ""):
        assert sweep(path, tmp_path) == [directory.name]
        assert content(directory) == before
    assert "which another run is using" in directory.with_suffix(".log").read_text()


def test_an_interrupted_sweep_says_how_it_goes_on_and_does(
    config: Config, tmp_path: Path
) -> None:
    config |= {"rounds": 100_000}
    path = write_study(tmp_path / "study.toml", config)
    directory = Path(str(run_of(config, tmp_path)["run.dir"]))
    command = [*SWEEP, str(path), "--out", str(tmp_path)]
    directory.mkdir()  # so that the run is made there
    # Of the first round there is a checkpoint once the second one is told.
    for kind, count, number, status in (
        ("round", 2, signal.SIGINT, 130),
        ("resumed", 1, signal.SIGTERM, 143),
    ):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            wait_until(partial(has_told, directory, kind, count, process))
            process.send_signal(number)
            told = process.communicate()[1]
        assert process.returncode == status, told
        assert "Traceback" not in told
        assert "leaked" not in told
        assert (
            "Interrupted. 1 of 1 run is left. The same command goes on with what is "
            "left, from the last checkpoints.\n" in told
        )


def has_told(
    directory: Path, kind: str, count: int, process: subprocess.Popen[str]
) -> bool:
    return process.poll() is not None or len(so_far(directory, kind)) >= count


def so_far(directory: Path, kind: str) -> list[str]:
    """Return the whole lines of a kind in a run's events."""
    path = directory / "events.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [line for line in lines if f'"event": "{kind}"' in line]


# Flower


FLWR = """
import json, os, signal, sys, time
command = sys.argv[1]
if command in ("log", "stop"):
    os.kill(os.getppid(), signal.SIGINT)
if command == "log":
    time.sleep(60)
print(json.dumps({"success": True, "run-id": "7"}))
"""


def test_impatience_leaves_no_run_running(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in `flwr log`, and again in `flwr stop`."""
    monkeypatch.setattr(flower, "_FLWR", (sys.executable, "-c", FLWR))
    (tmp_path / "pyproject.toml").write_text(
        "[tool.flwr.app.config]\nmethod = 'slora'\n"
    )
    with pytest.raises(KeyboardInterrupt, match="Run 7 is stopped"):
        flower.run_flower(tmp_path, config, 1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Terminal:
    """`slora` in a terminal of its own."""

    def __init__(self, environment: dict[str, str], *given: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [Path(sys.executable).parent / "slora", *given],
            env=environment,
            cwd=environment["FLWR_HOME"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self._said = ""

    def is_asleep(self) -> bool:
        """Whether it waits, as for a key.

        Python's `input` misses a signal that comes after its prompt and before that.
        """
        return psutil.Process(self.process.pid).status() == psutil.STATUS_SLEEPING

    def press_ctrl_c(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def write(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read_until(self, text: str) -> str:
        """Return what was printed up to a text, and forget it."""
        while text not in self._said:
            has_ended = self.process.poll() is not None
            # The SuperLink, which it may have started, keeps the terminal open.
            if select([self._master], [], [], 1.0)[0]:
                self._said += os.read(self._master, 4096).decode(errors="replace")
            else:
                assert not has_ended, f"no {text!r} in {self._said}"
        before, _, self._said = self._said.partition(text)
        return before


@pytest.mark.sockets
def test_ctrl_c_asks_and_a_stopped_run_resumes(
    config: Config, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with flower_home(tmp_path_factory.mktemp("flower")) as environment:
        config |= {"rounds": 100_000}
        directory = Path(str(config["run.dir"]))
        path = directory.parent / "run.toml"
        path.write_text(tomli_w.dumps(config))
        first = Terminal(environment, "run", str(ROOT), "--nodes", "1", "-c", str(path))
        wait_until(lambda: bool(list_checkpoints(directory)))
        first.press_ctrl_c()
        first.read_until("or leave it running? [S/l] (Ctrl-C stops it) ")
        first.write("l\n")
        first.read_until("Interrupted. Run ")
        run_id = first.read_until(" goes on: `flwr log").strip()
        assert first.process.wait() == 130
        done = len(so_far(directory, "round"))
        wait_until(lambda: len(so_far(directory, "round")) > done + 1)
        flwr = Path(sys.executable).parent / "flwr"
        subprocess.run([flwr, "stop", run_id], env=environment, check=True)
        wait_until(lambda: not is_locked(directory / "events.jsonl"))
        assert read_run(directory).state == "interrupted"

        resume = ("resume", str(directory), "--app", str(ROOT))
        second = Terminal(environment, *resume)
        wait_until(lambda: bool(so_far(directory, "resumed")))
        second.press_ctrl_c()
        second.read_until("(Ctrl-C stops it) ")
        wait_until(second.is_asleep)
        second.press_ctrl_c()
        second.read_until(f" is stopped. Go on with: slora resume {directory}")
        assert second.process.wait() == 130
        assert not is_locked(directory / "events.jsonl")
