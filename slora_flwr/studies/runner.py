"""The runner of a study: its runs, several at once, in worker processes."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections import Counter, deque
from collections.abc import Iterable
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, BinaryIO

import tomli_w
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column

from slora_flwr.common.files import write_atomically
from slora_flwr.common.text import counted
from slora_flwr.config import ConfigError, parse
from slora_flwr.config.identity import code_identity
from slora_flwr.config.methods import find_adapter
from slora_flwr.reports.figures import first_of, tell
from slora_flwr.reports.progress import clock
from slora_flwr.runs.events import EVENTS, RecordedRound, read_events
from slora_flwr.runs.lock import is_locked
from slora_flwr.studies.study import Config, Study, adapters_of, planned

# Folders of a run directory that hold states.
STATES = ("checkpoints", "adapter", "model")


@dataclass(frozen=True)
class StudyRun:
    """A run of a study: its config and its directory."""

    config: Config
    path: Path

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.name

    @property
    def log(self) -> Path:
        """The file that receives the run's output."""
        return self.path.with_name(f"{self.name}.log")

    @property
    def finished(self) -> bool:
        """Whether the run has completed."""
        return (self.path / "summary.json").is_file()

    @property
    def method(self) -> str:
        """The run's method."""
        return str(self.config["method"])

    @property
    def rounds(self) -> int:
        """Number of rounds of the whole run."""
        return int(self.config["rounds"])

    def can_resume(self) -> bool:
        """Return whether the run has a checkpoint from which this code goes on."""
        # Imported here, since a worker's torch must see its number of threads first.
        from slora_flwr.runs.checkpoint import find_checkpoint

        try:
            config = parse(self.resuming)  # refused with privacy
            checkpoint = find_checkpoint(config)
        except ConfigError:
            return False
        return code_identity(config).items() <= checkpoint.facts["identity"].items()

    def is_in_use(self) -> bool:
        """Return whether a process is making the run."""
        events = self.path / EVENTS
        return events.is_file() and is_locked(events)

    @property
    def resuming(self) -> Config:
        """The config that resumes the run."""
        return self.config | {"run.resume": str(self.path)}

    def summary(self) -> dict[str, Any]:
        """Return the content of summary.json."""
        return dict(
            json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        )

    def rounds_done(self) -> list[RecordedRound]:
        """Return the rounds so far."""
        events = read_events(self.path / EVENTS)
        return [event for event in events if isinstance(event, RecordedRound)]

    def evaluations(self) -> list[dict[str, float]]:
        """Return the metrics of the evaluated rounds."""
        rounds = self.rounds_done()
        return [done.metrics for done in rounds if "accuracy" in done.metrics]


class Runner:
    """Executes runs in persistent worker processes and displays their progress.

    Parameters
    ----------
    study : Study
        The study, which sets the number of workers and of all runs.
    app : Path or None
        Folder of the Flower app; None to run in the worker processes.
    keep_states : bool
        Keep the checkpoints and exported models of finished runs.
    """

    def __init__(self, study: Study, app: Path | None, keep_states: bool) -> None:
        self.failed: list[str] = []
        self.console = Console()
        if not self.console.is_terminal:
            self.console.width = 140
        self._app, self._keep_states = app, keep_states
        cores = os.cpu_count() or 1
        count = 1 if app else study.processes or _count_gpus() or cores
        self._threads = max(1, cores // count)
        # One executor per worker, since a worker that dies breaks its whole executor.
        self._slots = [self._executor(i) for i in range(count)]
        plan = list(planned(study))
        self._rounds_left: Counter[str] = Counter()
        for config in plan:
            parsed = parse(config)
            self._rounds_left[parsed.method] += parsed.rounds
        self._seconds: dict[str, list[float]] = {}
        self._done: set[Path] = set()
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column(overflow="fold")),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._bar = self._progress.add_task("runs", total=len(plan), left="")
        self._all = len(plan)
        self._commands: list[subprocess.Popen[bytes]] = []
        self._running: dict[Future[bool], tuple[StudyRun, int, TaskID]] = {}

    def __enter__(self) -> "Runner":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
        if kind is not None:
            for process in multiprocessing.active_children():
                process.terminate()
            for command in self._commands:
                command.send_signal(signal.SIGINT)
        for slot in self._slots:
            slot.shutdown(wait=kind is None, cancel_futures=True)
        if isinstance(error, KeyboardInterrupt):
            left = self._all - len(self._done)
            raise KeyboardInterrupt(
                f"{left} of {counted(self._all, 'run is', 'runs are')} left. The same "
                "command goes on with what is left, from the last checkpoints."
            ) from error

    def _executor(self, slot: int) -> Executor:
        if self._app:
            return ThreadPoolExecutor(1)
        return ProcessPoolExecutor(
            1,
            multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(self._threads, slot),
        )

    def finish(self, runs: Iterable[StudyRun]) -> None:
        """Execute the runs that are not finished."""
        left = []
        for run in {run.path: run for run in runs}.values():
            if run.finished:
                self._count(run)
            else:
                left.append(run)
        # The longest run first, so that no long one is left for the end.
        waiting = deque(sorted(left, key=self._length, reverse=True))
        free = list(range(len(self._slots)))
        while waiting or self._running:
            while free and waiting:
                self._start(waiting.popleft(), free.pop())
            ended, _ = wait(self._running, timeout=1.0, return_when=FIRST_COMPLETED)
            for call in ended:
                run, slot, bar = self._running.pop(call)
                free.append(slot)
                self._progress.remove_task(bar)
                self._close(run, call)
            if self.console.is_terminal:
                for run, _, bar in self._running.values():
                    self._progress.update(bar, completed=len(run.rounds_done()))
                self._progress.update(self._bar, left=self._left())

    def _length(self, run: StudyRun) -> tuple[float, bool, str]:
        adapters = map(find_adapter, adapters_of(run.config))
        all_weights = any(adapter.copies_weights for adapter in adapters)
        return run.rounds * self._pace(run.method), all_weights, run.name

    def _start(self, run: StudyRun, slot: int) -> None:
        write_atomically(run.log, b"")
        bar = self._progress.add_task(f"  {run.name}", total=run.rounds, left="")
        self._running[self._submit(run, slot)] = run, slot, bar

    def _submit(self, run: StudyRun, slot: int) -> Future[bool]:
        execute = self._run_flower if self._app else _execute
        try:
            return self._slots[slot].submit(execute, run)
        except BrokenExecutor:  # its process died
            self._slots[slot] = self._executor(slot)
            return self._slots[slot].submit(execute, run)

    def _run_flower(self, run: StudyRun) -> bool:
        """Execute a run by `slora run` and return whether it completed."""
        config = run.path.with_name(f"{run.name}.toml")
        write_atomically(config, tomli_w.dumps(_begin(run)).encode())
        with run.log.open("wb") as log:
            return self._call("run", str(self._app), "-c", str(config), log=log) == 0

    def _call(self, *arguments: str, log: BinaryIO) -> int:
        """Return the exit status of `slora` in a process of its own."""
        main = "from slora_flwr.cli import app; app()"
        with subprocess.Popen(
            [sys.executable, "-c", main, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            process_group=0,  # so that Ctrl-C reaches it once, through this process
        ) as process:
            self._commands.append(process)
            return process.wait()

    def _close(self, run: StudyRun, call: Future[bool]) -> None:
        try:
            well, reason = call.result(), "its log ends with"
        except BrokenExecutor:
            well, reason = False, "its process died; its log ends with"
        if not well:
            self._rounds_left[run.method] -= run.rounds
            lines = run.log.read_text(encoding="utf-8", errors="replace").splitlines()[
                -8:
            ]
            self.fail(run.name, "\n  ".join([reason, *lines]))
            return
        if not self._keep_states:
            for name in STATES:
                shutil.rmtree(run.path / name, ignore_errors=True)
        self._count(run)
        summary = run.summary()
        metric = first_of(summary)
        self.console.print(
            f"{len(self._done)}/{self._all} {run.name}  "
            f"{tell(metric, summary[metric])}  "
            f"{clock(summary['seconds'])}  {self._left()}",
            highlight=False,
            soft_wrap=True,
        )

    def _count(self, run: StudyRun) -> None:
        if run.path in self._done:
            return
        self._done.add(run.path)
        self._rounds_left[run.method] -= run.rounds
        seconds = run.summary()["seconds"] / run.rounds
        self._seconds.setdefault(run.method, []).append(seconds)
        self._progress.update(self._bar, completed=len(self._done))

    def _pace(self, method: str) -> float:
        """Return the seconds per round of the method's finished runs, or of all."""
        every = list(itertools.chain.from_iterable(self._seconds.values()))
        return fmean(self._seconds.get(method) or every or [1.0])

    def _left(self) -> str:
        """Return the time left, estimated from the finished runs."""
        if not self._seconds:
            return ""
        rounds = self._rounds_left.copy()
        for run, _, _ in self._running.values():
            rounds[run.method] -= len(run.rounds_done())
        left = sum(self._pace(method) * n for method, n in rounds.items())
        at_once = max(1, min(len(self._slots), self._all - len(self._done)))
        return f"{clock(left / at_once)} left"

    def fail(self, name: str, reason: str) -> None:
        """Record and print a failure."""
        self.failed.append(name)
        self.console.print(
            f"failed: {name}: {reason}", highlight=False, markup=False, soft_wrap=True
        )


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _start_worker(threads: int, slot: int) -> None:
    # The sweep's own process handles Ctrl-C and terminates this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    torch.set_num_threads(threads)
    if gpus := torch.cuda.device_count():
        torch.cuda.set_device(slot % gpus)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _execute(run: StudyRun) -> bool:
    """Execute a run in this worker and return whether it completed."""
    with run.log.open("wb") as log:
        # Redirect file descriptors, since not all output passes through sys.stdout.
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    return _run_inline(run)


def _run_inline(run: StudyRun) -> bool:
    # Imported here, once per worker: torch must see the number of threads above.
    from slora_flwr.engines.inline import run_inline

    try:
        run_inline(_begin(run))
    except Exception:
        traceback.print_exc()
        return False
    finally:
        sys.stdout.flush()
    return True


def _begin(run: StudyRun) -> Config:
    """Return the config that resumes a run or, if it cannot, that begins it anew."""
    # One that another process has in use is refused as it resumes, and stays as it is.
    if run.can_resume() or run.is_in_use():
        return run.resuming
    shutil.rmtree(run.path, ignore_errors=True)
    return run.config
