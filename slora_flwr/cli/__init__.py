"""The command line: `slora`."""

from collections.abc import Callable
from typing import Annotated

import typer

from slora_flwr import __version__
from slora_flwr.cli.apps import new
from slora_flwr.cli.node import check, show_log
from slora_flwr.cli.options import MergingCommand
from slora_flwr.cli.planning import plan, show_config
from slora_flwr.cli.reports import compare, report, runs
from slora_flwr.cli.results import chat, export, predict, push
from slora_flwr.cli.running import resume, run
from slora_flwr.cli.studies import sweep
from slora_flwr.cli.watching import watch

COMMANDS: dict[str, Callable[..., None]] = {
    "new": new,
    "run": run,
    "resume": resume,
    "plan": plan,
    "config": show_config,
    "runs": runs,
    "predict": predict,
    "chat": chat,
    "export": export,
    "push": push,
    "watch": watch,
    "report": report,
    "compare": compare,
    "sweep": sweep,
}
NODE_COMMANDS: dict[str, Callable[..., None]] = {"check": check, "log": show_log}
app = typer.Typer(
    help="Federated fine-tuning of transformers: SLoRA and its peers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"slora-flwr {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    """Accept the options shared by all commands."""


node = typer.Typer(help="A node's policy, and the log of what it was asked.")
for group, commands in ((app, COMMANDS), (node, NODE_COMMANDS)):
    for name, command in commands.items():
        group.command(name, cls=MergingCommand)(command)
app.add_typer(node, name="node", no_args_is_help=True)
