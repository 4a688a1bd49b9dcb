"""`slora sweep`: the runs of a study, several at once, each of them made once."""

import csv
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Iterator
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
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, BinaryIO

import tomli_w
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from slora_flwr.common.files import write_atomically
from slora_flwr.config import ConfigError, Value, flatten, parse
from slora_flwr.config.methods import find_adapter
from slora_flwr.reports.progress import clock
from slora_flwr.runs.lock import sole_use
from slora_flwr.studies.study import (
    Config,
    Score,
    Study,
    Trial,
    adapters_of,
    best_rate,
    digest_of,
    planned,
    read_study,
    tune,
    varying,
)

STATES = ("checkpoints", "adapter", "model")
# What a row of `runs.csv` says of a run: its heading and format in the table, and
# whether that gives the spread over seeds too.
FIGURES = {
    "accuracy": ("accuracy", ".1%", True),
    "accuracy_last_5": ("mean of last 5", ".1%", True),
    "macro_f1": ("macro-F1", ".3f", True),
    "loss": ("loss", ".3f", True),
    "payload_mb_up": ("MB up", ".1f", False),
    "payload_mb_down": ("MB down", ".1f", False),
    "seconds": ("seconds", ".0f", False),
}


@dataclass(frozen=True)
class Run:
    """One run of a study and its directory."""

    config: Config
    path: Path

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.name

    @property
    def log(self) -> Path:
        """The file of all that the run prints."""
        return self.path.with_name(f"{self.name}.log")

    @property
    def finished(self) -> bool:
        """Whether it need not be run again."""
        return (self.path / "summary.json").is_file()

    @property
    def method(self) -> str:
        """The run's method."""
        return str(self.config["method"])

    @property
    def rounds(self) -> int:
        """Rounds of the whole run."""
        return int(self.config["rounds"])

    def summary(self) -> dict[str, Any]:
        """Read summary.json."""
        return dict(json.loads((self.path / "summary.json").read_text()))

    def rounds_done(self) -> list[dict[str, Any]]:
        """Read the events of the rounds so far."""
        path = self.path / "events.jsonl"
        # The last line may be half written.
        text = path.read_text().rpartition("\n")[0] if path.is_file() else ""
        events = [json.loads(line) for line in text.splitlines()]
        return [event for event in events if event["event"] == "round"]

    def evaluations(self) -> list[dict[str, Any]]:
        """Read the events of the rounds that were evaluated."""
        return [e for e in self.rounds_done() if e.get("accuracy") is not None]


def sweep(path: Path, out: Path | None = None, keep_states: bool = False) -> list[str]:
    """Make all runs of a study that are not finished.

    Parameters
    ----------
    path : Path
        The study file; `slora_flwr.studies.study` explains it.
    out : Path or None
        The folder for run directories, `runs.csv` and `tuning.csv`; None for
        `results/<stem of the file>` beside the file.
    keep_states : bool
        Keep the checkpoints and exported models of finished runs.

    Returns
    -------
    list[str]
        What failed.

    Raises
    ------
    ConfigError
        Before the first run, for a file that does not describe a study.
    """
    study = read_study(path)
    app = _app_folder(path) if study.engine == "flwr" else None
    folder = (out or path.parent / "results" / path.stem).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    keys = varying(study.runs) or ["method"]
    scores: dict[Trial, dict[float, Score]] = {}

    def choose(trials: list[Trial]) -> dict[Trial, float]:
        runs = {
            trial: {
                rate: _make_run(folder, trial.config(rate), trial.named, "tune")
                for rate in trial.rates
            }
            for trial in trials
        }
        runner.finish(run for by_rate in runs.values() for run in by_rate.values())
        for trial, by_rate in runs.items():
            scores[trial] = {
                rate: Score.of(run.evaluations())
                for rate, run in by_rate.items()
                if run.finished
            }
            if not scores[trial]:
                name = f"{trial.label} {trial.key}"
                runner.fail(name, "no tuning run ended well")
        if scores:
            _write_rows(folder / "tuning.csv", list(_tuning_rows(scores)))
        return {trial: best_rate(s) for trial, s in scores.items() if s}

    # It would take runs under way for interrupted ones.
    refusal = (
        f"--out is {folder}, where another sweep is under way; allowed: another "
        "folder, or to wait"
    )
    with sole_use(folder, refusal), _Runner(study, app, keep_states) as runner:
        configs = {digest_of(config): config for config in tune(study, choose)}
        runs = [_make_run(folder, config, keys) for config in configs.values()]
        runner.finish(runs)
    say = partial(runner.console.print, highlight=False, markup=False, soft_wrap=True)
    for line in _describe_tuning(scores):
        say(line)
    finished = [run for run in runs if run.finished]
    if finished:
        varied = varying(configs.values())
        rows = [_row(run, varied) for run in finished]
        _write_rows(folder / "runs.csv", rows)
        runner.console.print(_table(rows, [key for key in varied if key in keys]))
        say(folder / "runs.csv")
    return runner.failed


def _app_folder(path: Path) -> Path:
    for folder in path.absolute().parents:
        if (folder / "pyproject.toml").is_file():
            return folder
    raise ConfigError(
        f"sweep.engine is 'flwr', and {path.absolute()} is in no checkout; allowed: a "
        "study file in a checkout of slora-flwr, or engine inline"
    )


def _make_run(
    folder: Path, config: Config, named: Iterable[str], purpose: str = ""
) -> Run:
    digest, full = digest_of(config), flatten(parse(config))
    parts = [purpose] if purpose else []
    for key in named:
        if key in config:
            value = re.sub(r"[^\w.]+", "-", f"{config[key]}").strip("-")[-40:]
            text = isinstance(config[key], str)
            parts.append(value if text else f"{_last(key)}{value}")
    found = [path for path in folder.glob(f"*-{digest}") if path.is_dir()]
    # Whatever else the study varies by now, a run is known by its digest.
    path = found[0] if found else folder / "-".join([*parts, digest])
    return Run(full | {"run.dir": str(path)}, path)


def _last(key: str) -> str:
    return key.rpartition(".")[2]


class _Runner:
    """Makes runs in worker processes that live on, and says how far they are."""

    def __init__(self, study: Study, app: Path | None, keep_states: bool) -> None:
        self.failed: list[str] = []
        self.console = Console()
        if not self.console.is_terminal:
            self.console.width = 140
        self._app, self._keep_states = app, keep_states
        cores = os.cpu_count() or 1
        count = 1 if app else study.processes or _count_gpus() or cores
        self._threads = max(1, cores // count)
        # An executor for each worker, so that one that dies takes no other with it.
        self._slots = [self._executor(i) for i in range(count)]
        plan = list(planned(study))
        self._rounds_left: Counter[str] = Counter()
        for config in plan:
            parsed = parse(config)
            self._rounds_left[parsed.method] += parsed.rounds
        self._seconds: dict[str, list[float]] = {}
        self._done: set[Path] = set()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._bar = self._progress.add_task("runs", total=len(plan), left="")
        self._all = len(plan)
        self._running: dict[Future[bool], tuple[Run, int, TaskID]] = {}

    def __enter__(self) -> "_Runner":
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._progress.stop()
        if kind is not None:
            for process in multiprocessing.active_children():
                process.terminate()
        for slot in self._slots:
            slot.shutdown(wait=kind is None, cancel_futures=True)

    def _executor(self, slot: int) -> Executor:
        if self._app:
            return ThreadPoolExecutor(1)
        return ProcessPoolExecutor(
            1,
            multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(self._threads, slot),
        )

    def finish(self, runs: Iterable[Run]) -> None:
        """Make those of the runs that are not finished."""
        left = []
        for run in {run.path: run for run in runs}.values():
            if run.finished:
                self._count(run)
            else:
                left.append(run)
        # The longest first, so that none of them is left for the end.
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

    def _length(self, run: Run) -> tuple[float, bool, str]:
        adapters = map(find_adapter, adapters_of(run.config))
        all_weights = any(adapter.copies_weights for adapter in adapters)
        return run.rounds * self._pace(run.method), all_weights, run.name

    def _start(self, run: Run, slot: int) -> None:
        shutil.rmtree(run.path, ignore_errors=True)
        write_atomically(run.log, b"")
        bar = self._progress.add_task(f"  {run.name}", total=run.rounds, left="")
        self._running[self._submit(run, slot)] = run, slot, bar

    def _submit(self, run: Run, slot: int) -> Future[bool]:
        try:
            return self._slots[slot].submit(_carry_out, run, self._app)
        except BrokenExecutor:  # its process died
            self._slots[slot] = self._executor(slot)
            return self._slots[slot].submit(_carry_out, run, self._app)

    def _close(self, run: Run, call: Future[bool]) -> None:
        try:
            well, reason = call.result(), "its log ends with"
        except BrokenExecutor:
            well, reason = False, "its process died; its log ends with"
        if not well:
            self._rounds_left[run.method] -= run.rounds
            lines = run.log.read_text(errors="replace").splitlines()[-8:]
            self.fail(run.name, "\n  ".join([reason, *lines]))
            return
        if not self._keep_states:
            for name in STATES:
                shutil.rmtree(run.path / name, ignore_errors=True)
        self._count(run)
        summary = run.summary()
        accuracy = summary["accuracy"]
        figures = "-" if accuracy is None else f"{accuracy:.1%}"
        self.console.print(
            f"{len(self._done)}/{self._all} {run.name}  accuracy {figures}  "
            f"{clock(summary['seconds'])}  {self._left()}",
            highlight=False,
            soft_wrap=True,
        )

    def _count(self, run: Run) -> None:
        if run.path in self._done:
            return
        self._done.add(run.path)
        self._rounds_left[run.method] -= run.rounds
        seconds = run.summary()["seconds"] / run.rounds
        self._seconds.setdefault(run.method, []).append(seconds)
        self._progress.update(self._bar, completed=len(self._done))

    def _pace(self, method: str) -> float:
        """Give the seconds a round of the method's finished runs, or of all."""
        every = list(itertools.chain.from_iterable(self._seconds.values()))
        return fmean(self._seconds.get(method) or every or [1.0])

    def _left(self) -> str:
        """Estimate the time left from the finished runs."""
        if not self._seconds:
            return ""
        rounds = self._rounds_left.copy()
        for run, _, _ in self._running.values():
            rounds[run.method] -= len(run.rounds_done())
        left = sum(self._pace(method) * n for method, n in rounds.items())
        at_once = max(1, min(len(self._slots), self._all - len(self._done)))
        return f"{clock(left / at_once)} left"

    def fail(self, name: str, reason: str) -> None:
        """Note a failure."""
        self.failed.append(name)
        self.console.print(
            f"failed: {name}: {reason}", highlight=False, markup=False, soft_wrap=True
        )


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _start_worker(threads: int, slot: int) -> None:
    # The sweep's own process hears Ctrl-C, and ends this one.
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


def _carry_out(run: Run, app: Path | None) -> bool:
    """Make a run; tell whether it ended well."""
    with run.log.open("wb") as log:
        if app is not None:
            return _run_flower(run, app, log)
        # File descriptors, since not all that is printed passes through sys.stdout.
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    return _run_inline(run)


def _run_inline(run: Run) -> bool:
    # torch and transformers are imported here, once a worker.
    from slora_flwr.engines.inline import InlineGrid
    from slora_flwr.server.run import run as run_on

    run_id = time.time_ns()
    try:
        run_on(InlineGrid(run.config, 1, run_id), run.config, run_id)
    except Exception:
        traceback.print_exc()
        return False
    finally:
        sys.stdout.flush()
    return True


def _run_flower(run: Run, app: Path, log: BinaryIO) -> bool:
    config = run.path.with_name(f"{run.name}.toml")
    write_atomically(config, tomli_w.dumps(run.config).encode())
    main = "from slora_flwr.cli import app; app()"
    command = [sys.executable, "-c", main, "run", str(app), "-c", str(config)]
    done = subprocess.run(command, stdout=log, stderr=log, check=False)
    return done.returncode == 0


def _tuning_rows(scores: dict[Trial, dict[float, Score]]) -> Iterator[dict[str, Any]]:
    for trial, by_rate in scores.items():
        for rate in trial.rates:
            score = by_rate.get(rate)
            yield {
                **dict(zip(trial.per, trial.values, strict=True)),
                "key": trial.key,
                "rate": rate,
                "accuracy": score and score.accuracy,
                "loss": score and score.loss,
                "chosen": int(score is not None and rate == best_rate(by_rate)),
            }


def _describe_tuning(scores: dict[Trial, dict[float, Score]]) -> Iterator[str]:
    for trial, by_rate in scores.items():
        if by_rate:
            best = best_rate(by_rate)
            where = ", an end of the grid" if best in trial.ends else ""
            yield f"{trial.label}: {trial.key} {best:g}{where}"


def _row(run: Run, keys: list[str]) -> dict[str, Any]:
    summary = run.summary()
    last = [event["accuracy"] for event in run.evaluations()][-5:]
    return {
        **{key: run.config[key] for key in keys},
        "accuracy": summary["accuracy"],
        "accuracy_last_5": fmean(last) if last else None,
        "macro_f1": summary["macro_f1"],
        "loss": summary["loss"],
        "payload_mb_up": summary["payload_bytes_up"] / 1e6,
        "payload_mb_down": summary["payload_bytes_down"] / 1e6,
        "seconds": summary["seconds"],
        "run": run.name,
    }


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _table(rows: list[dict[str, Any]], keys: list[str]) -> Table:
    """Lay out means and standard deviations over seeds."""
    keys = [key for key in keys if key != "seed"]
    table = Table()
    for key in keys:
        table.add_column(_last(key))
    for heading in ("runs", *(heading for heading, _, _ in FIGURES.values())):
        table.add_column(heading, justify="right")
    groups: dict[tuple[Value, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    for values, group in groups.items():
        figures = [
            _mean([row[name] for row in group], form, spread)
            for name, (_, form, spread) in FIGURES.items()
        ]
        table.add_row(*map(str, values), str(len(group)), *figures)
    return table


def _mean(values: list[float | None], form: str, spread: bool) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return "-"
    mean = format(fmean(found), form)
    if not spread or len(found) == 1:
        return mean
    return f"{mean} ± {format(stdev(found), form)}"
