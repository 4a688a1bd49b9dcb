"""A terminal of 80 columns for commands."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping

COLUMNS, LINES = 80, 24
# Colours, and what moves the cursor or clears lines.
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_SLORA = [sys.executable, "-c", "from slora_flwr.cli import app; app()"]


def slora_on_terminal(
    *arguments: object, environment: Mapping[str, str] | None = None
) -> tuple[int, list[str]]:
    """Return the exit status of `slora` on a terminal, and the lines it has shown."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    known = {**os.environ, **(environment or {}), "TERM": "xterm"}
    # These say otherwise how wide the terminal is, or that there is none.
    for name in ("COLUMNS", "LINES", "NO_COLOR", "TTY_COMPATIBLE", "CI"):
        known.pop(name, None)
    process = subprocess.Popen(
        [*_SLORA, *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=known,
        start_new_session=True,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            more = os.read(ours, 65536)
        except OSError:  # the last process has closed it
            break
        if not more:
            break
        shown += more
    os.close(ours)
    text = _CONTROL.sub("", shown.decode())
    return process.wait(), re.split(r"[\r\n]+", text)
