"""`slora watch` as a process, and its stream of events."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SLORA = [sys.executable, "-c", "from slora_flwr.cli import app; app()"]


@contextmanager
def watching(*arguments: object) -> Iterator[str]:
    """Run `slora watch`, and yield the address that it prints."""
    command = [*SLORA, "watch", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()
