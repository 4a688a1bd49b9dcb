"""Processes and ports that tests wait for."""

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

# More seconds than anything takes, however busy the machine is.
LONG = 900.0


def residents(folder: Path) -> list[psutil.Process]:
    """Return the resident workers whose sockets are below a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
        except psutil.Error:  # gone, or another user's
            continue
        if "slora_flwr.client.resident" in command and str(folder) in " ".join(command):
            found.append(process)
    return found


def has_ended(process: psutil.Process) -> bool:
    """Tell a process that has ended, though its parent may not know yet."""
    with suppress(psutil.NoSuchProcess):
        return process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return True


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds; fail once only a hang can explain the delay."""
    until = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def is_open(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0
