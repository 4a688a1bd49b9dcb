"""`slora new`: the folder of an app."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from slora_flwr.cli.options import RunConfigOption, ending_cleanly, merge_values


def new(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A new or empty folder, whose name is that of the app."
        ),
    ],
    run_config: RunConfigOption = None,
    publisher: Annotated[
        str, typer.Option(help="Your name on Flower's Hub, where the app may go.")
    ] = "local",
) -> None:
    """Write a small Flower app, for `flwr run DIR`, with run config values in it."""
    from slora_flwr.engines.app_folder import write_app

    with ending_cleanly(OSError):
        write_app(folder, merge_values(run_config), publisher=publisher)
        typer.echo(f"{folder}: pyproject.toml has its settings. Run it:")
        typer.echo(f"flwr run {shlex.quote(str(folder))} --stream")
