"""`slora watch`: a local page that follows a run."""

from pathlib import Path
from typing import Annotated

import typer

from slora_flwr.cli.options import RunArgument, ending_cleanly


def watch(
    run: RunArgument = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the page; 0: a free one.")
    ] = 0,
) -> None:
    """Serve a page that follows a run as it is made, to this machine alone.

    Without RUN it follows the newest run, also one that begins later. Ctrl-C ends it.
    """
    from slora_flwr.runs.reader import RunError, find_run
    from slora_flwr.watch.server import serve

    def newest() -> Path | None:
        try:
            return find_run(None)
        except RunError:  # none has begun yet
            return None

    with ending_cleanly(OSError):
        path = None if run is None else find_run(run).absolute()
        try:
            serve(newest if path is None else lambda: path, port, typer.echo)
        except KeyboardInterrupt:  # the usual way out
            typer.echo()
