"""What processes of their own do, which test_resume kills or starves."""

import os
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from slora_flwr.cli import app
from slora_flwr.config import Value
from slora_flwr.server.inline import InlineGrid
from slora_flwr.server.run import run

Config = dict[str, Value]


def carry_out(config: Config, run_id: int, log: Path, dies_at: int = 0) -> None:
    """Make a run as `slora run --engine inline` does.

    It dies by SIGKILL at the n-th step of writing files: in the middle of a file's
    bytes, before or after its `fsync`, before or after its renaming.
    """
    torch.set_num_threads(1)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if dies_at:
        _be_mortal(dies_at)
    run(InlineGrid(config, nodes=2, run_id=run_id), config, run_id)


def command(
    arguments: list[str], answer: Connection, limit: int | None, user: int | None
) -> None:
    """Give the command line's exit status and output.

    Parameters
    ----------
    arguments : list[str]
        After `slora`.
    answer : Connection
        Where they are sent.
    limit : int or None
        Bytes beyond which no file can grow, as if the disk were full.
    user : int or None
        Who runs it.
    """
    torch.set_num_threads(1)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if user is not None:
        os.setgid(user)
        os.setuid(user)
    done = CliRunner().invoke(app, arguments)
    answer.send((done.exit_code, done.output))


def _be_mortal(steps: int) -> None:
    left = steps

    def die_in_time() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            die_in_time()
            result = function(*arguments)
            die_in_time()
            return result

        return call

    write = Path.write_bytes

    def write_bytes(path: Path, data: bytes) -> int:
        write(path, data[: len(data) // 2])
        die_in_time()
        return write(path, data)

    Path.write_bytes = write_bytes  # type: ignore[method-assign, assignment]
    Path.replace = around(Path.replace)  # type: ignore[method-assign]
    os.fsync = around(os.fsync)
