"""Flower's simulation, started by `flwr run` and followed to the run's end."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import click
import tomli_w
import torch
import typer

from slora_flwr.config import ConfigError, Value, parse
from slora_flwr.engines.app_folder import is_app
from slora_flwr.engines.start_up import is_noise
from slora_flwr.reports.live_table import LiveTable
from slora_flwr.runs.directory import how_to_resume
from slora_flwr.runs.events import EVENTS
from slora_flwr.runs.lock import is_locked
from slora_flwr.runs.reader import RunError, find_run

_PATIENCE = 60.0
_FLWR = (sys.executable, "-m", "flwr.cli.app")


class FlowerError(RuntimeError):
    """Flower did not start a run, or the run did not complete."""


def run_flower(
    folder: Path,
    values: Mapping[str, Value],
    nodes: int | None = None,
    may_go_on: Callable[[str], bool] = lambda run_id: False,
    verbose: bool = False,
) -> None:
    """Run the app in Flower's simulation on Ray, and wait until the run ends.

    Parameters
    ----------
    folder : Path
        Folder of the app.
    values : Mapping[str, Value]
        Flat run config values that override those of the app.
    nodes : int or None
        Number of simulated nodes; None for one per GPU or, without GPUs, per core.
    may_go_on : Callable[[str], bool]
        Called after Ctrl-C with the run's id: whether the run may go on.
    verbose : bool
        Print what Flower and Ray say at the start too.

    Raises
    ------
    ConfigError
        If the folder holds no app.
    FlowerError
        If the run does not start or does not complete.
    KeyboardInterrupt
        After Ctrl-C. Its message says what became of the run.
    """
    if not is_app(folder):
        raise ConfigError(
            f"{folder.absolute()} holds no Flower app; allowed: a folder of `slora "
            "new`, a checkout of slora-flwr, none for what is installed, or "
            "--engine inline"
        )
    run_id = _start(folder, values, nodes)
    try:
        typer.echo(f"Run {run_id} has started; its log: `flwr log {run_id}`")
        status = _follow(run_id, verbose)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(_interrupt(run_id, values, may_go_on)) from error
    listed = _flwr("list", "--run-id", run_id, "--format", "json")
    became = listed["runs"][0]["status"]
    # `flwr log` exits with 0 even if the run failed.
    if became != "finished:completed" or status:
        raise FlowerError(f"run {run_id} is {became}")


def _start(folder: Path, values: Mapping[str, Value], nodes: int | None) -> str:
    """Start a run and return its id."""
    gpus = torch.cuda.device_count()
    nodes = nodes or gpus or os.cpu_count() or 1
    # Ray assigns a fraction of one GPU, or whole GPUs.
    share = min(1.0, gpus / nodes)
    resources = f"client-resources-num-cpus=1 client-resources-num-gpus={share}"
    command = ["run", str(folder), "--format", "json"]
    command += ["--federation-config", f"num-supernodes={nodes} {resources}"]
    with tempfile.NamedTemporaryFile("wb", suffix=".toml") as file:
        # A file, since Flower's key=value has no strings with both kinds of quotes.
        file.write(tomli_w.dumps(values).encode())
        file.flush()
        return str(_flwr(*command, "--run-config", file.name)["run-id"])


def _follow(run_id: str, verbose: bool) -> int:
    """Print a run's log until it ends; return the exit status of `flwr log`."""
    quiet = {} if verbose else {"FLWR_LOG_LEVEL": "WARNING"}  # of that command alone
    with subprocess.Popen(
        [sys.executable, "-u", *_FLWR[1:], "log", run_id, "--stream"],
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
        env=quiet | os.environ,
    ) as process:
        assert process.stdout is not None
        try:
            show(process.stdout, LiveTable.of_terminal(), verbose)
        except KeyboardInterrupt:
            process.kill()
            raise
    return process.returncode


def show(lines: Iterable[str], live: LiveTable | None, verbose: bool = False) -> None:
    """Print lines of a run's log as they come.

    Parameters
    ----------
    lines : Iterable[str]
        The lines.
    live : LiveTable or None
        Where to show how far the run is; None to print that as any other line.
    verbose : bool
        Print what Flower and Ray say at the start too.
    """
    # What is asked after Ctrl-C needs the terminal itself.
    with nullcontext() if live is None else live:
        for line in lines:
            plain = click.unstyle(line).rstrip()
            level, _, message = plain.partition(":")
            if live is not None and live.hear(level.strip(), message.strip()):
                continue
            if not verbose and is_noise(plain):
                continue
            if live is None:
                typer.echo(line, nl=False)  # without colours if it is no terminal
            else:
                live.above(line.rstrip("\n"))


def _interrupt(
    run_id: str, values: Mapping[str, Value], may_go_on: Callable[[str], bool]
) -> str:
    """Stop a run unless it may go on; return what became of it."""
    if may_go_on(run_id):
        return (
            f"Run {run_id} goes on: `flwr log {run_id} --stream` follows it, "
            f"`flwr stop {run_id}` stops it."
        )
    # Until the run is stopped, further Ctrl-C would leave it running unsaid.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _flwr("stop", run_id, "--format", "json")
    except FlowerError as error:
        return f"Run {run_id} could not be stopped: {error}"
    finally:
        signal.signal(signal.SIGINT, before)
    config = parse(values).run
    given = config.resumed if config.resume else config.dir or run_id
    try:
        path = find_run(str(given))
    except RunError:  # it has not begun to write
        return f"Run {run_id} is stopped."
    # Its process learns of it with its next heartbeat, after up to half a minute.
    until = time.monotonic() + _PATIENCE
    with suppress(KeyboardInterrupt):  # by one who will not wait for it
        while is_locked(path / EVENTS) and time.monotonic() < until:
            time.sleep(0.2)
    return f"Run {run_id} is stopped. {how_to_resume(path)}"


def _flwr(*arguments: str) -> dict[str, Any]:
    """Return the JSON answer of a `flwr` command."""
    done = subprocess.run(
        [*_FLWR, *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    try:
        answer = json.loads(done.stdout)
    except json.JSONDecodeError:
        answer = {"success": False, "error-message": done.stdout.strip()}
    if done.returncode or not answer.get("success"):
        raise FlowerError(answer.get("error-message", "flwr failed"))
    return dict(answer)
