"""Flower's simulation with a SuperLink of the test's own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.support.processes import free_port


@contextmanager
def flower_home(home: Path) -> Iterator[dict[str, str]]:
    """Yield an environment with its own SuperLink; end what was started in it."""
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        "SLORA_HOME": str(home / "slora"),
    }
    yield environment
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME") == str(home):
                process.kill()
        except psutil.Error:  # gone, or another user's: not ours
            continue
