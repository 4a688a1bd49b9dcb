"""A line at the foot of a terminal that shows what is under way."""

import sys
from logging import StreamHandler
from typing import Any

from flwr.common.logger import console_handler
from rich.console import Console
from rich.status import Status
from rich.text import Text


class LiveLine:
    """A line below all that is printed, until it is hidden.

    Parameters
    ----------
    console : Console
        A terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None
        self._log: StreamHandler[Any] = console_handler
        self._stream: Any = None

    @classmethod
    def of_terminal(cls, *, stderr: bool = False) -> "LiveLine | None":
        """Return a line of stdout or stderr; None if that is no terminal."""
        console = Console(stderr=stderr)
        return cls(console) if console.is_terminal else None

    def show(self, text: str) -> None:
        """Show the line, or change it."""
        if self._status is not None:
            self._status.update(Text(text))
            return
        self._status = self._console.status(Text(text))
        self._status.start()
        # From now on sys.stderr prints above the line, which Flower's log bypasses.
        self._stream = self._log.setStream(sys.stderr)

    def hide(self) -> None:
        """Remove the line."""
        if self._status is not None:
            self._status.stop()
            self._status = None
            self._log.setStream(self._stream or sys.stderr)
