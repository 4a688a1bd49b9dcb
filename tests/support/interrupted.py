"""Processes that test_killed kills or starves.

A run's imports take much longer than the run. So one process, the nursery, completes a
run and then forks a child for each further one.
"""

import ctypes
import gc
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from slora_flwr.cli import app
from slora_flwr.config import Value
from slora_flwr.engines.inline import InlineGrid
from slora_flwr.server.run import run

Config = dict[str, Value]

NODES = 2


def nursery(requests: Connection, config: Config, log: Path) -> None:
    """Serve each request in a child process.

    A request is a function of this module, its arguments, and the seconds after which
    the child is killed. The answer is the exit status and the function's result.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # CUDA does not survive a fork
    torch.set_num_threads(1)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    run(InlineGrid(config, NODES), config, 1)
    context = multiprocessing.get_context("fork")
    gc.freeze()  # what is not looked at is not copied
    while request := requests.recv():
        function, arguments, seconds = request
        here, there = context.Pipe(duplex=False)
        child = context.Process(target=_report, args=(there, function, arguments))
        child.start()
        there.close()
        child.join(seconds)
        child.kill()
        child.join()
        requests.send((child.exitcode, here.recv() if child.exitcode == 0 else None))


def carry_out(config: Config, dies_at: int = 0) -> None:
    """Run as `slora run --engine inline` does.

    The process kills itself at step `dies_at` of writing files. A step is the middle of
    a file's bytes, or the time before or after its `fsync` or its renaming.
    """
    if dies_at:
        _be_mortal(dies_at)
    run_id = time.time_ns()
    run(InlineGrid(config, NODES, run_id), config, run_id)


def command(arguments: list[str], limit: int | None = None) -> tuple[int, str]:
    """Return the command line's exit status and output.

    Parameters
    ----------
    arguments : list[str]
        Arguments after `slora`.
    limit : int or None
        Bytes beyond which no file can grow, as if the disk were full.
    """
    if os.getuid() == 0:
        _obey_permissions()
    if limit is not None:
        # The log may be longer already: what is left unwritten would end the process.
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, done.output


def _report(answer: Connection, function: Callable[..., Any], arguments: Any) -> None:
    answer.send(function(*arguments))


def _obey_permissions() -> None:
    """Drop CAP_DAC_OVERRIDE, root's right to write read-only files."""
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    sets = (ctypes.c_uint32 * 6)()
    libc.capget(header, sets)
    sets[0] &= ~(1 << 1)
    assert libc.capset(header, sets) == 0


def _be_mortal(steps: int) -> None:
    left = steps

    def step() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            step()
            result = function(*arguments)
            step()
            return result

        return call

    write = Path.write_bytes

    def write_bytes(path: Path, data: bytes) -> int:
        write(path, data[: len(data) // 2])
        step()
        return write(path, data)

    Path.write_bytes = write_bytes  # type: ignore[method-assign, assignment]
    Path.replace = around(Path.replace)  # type: ignore[method-assign]
    os.fsync = around(os.fsync)
