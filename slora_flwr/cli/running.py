"""`slora run` and `slora resume`: runs, over Flower or in this process."""

import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from slora_flwr.cli.options import (
    RunConfigOption,
    ending_cleanly,
    heeding_sigterm,
    merge_values,
)
from slora_flwr.config import Value, parse, refuse
from slora_flwr.config.arguments import read_file


class Engine(StrEnum):
    """The engines of `slora run`."""

    FLWR = "flwr"
    INLINE = "inline"


VerboseOption = Annotated[
    bool,
    typer.Option(
        "--verbose", help="Print what Flower and Ray say at the run's start too."
    ),
]
_FOLDER = (
    "Folder of the app, from `slora new` or a checkout; default: the current one if it "
    "holds an app, else the installed slora-flwr."
)
FolderOption = Annotated[Path | None, typer.Option("--app", help=_FOLDER)]


def run(
    folder: Annotated[Path | None, typer.Argument(help=_FOLDER)] = None,
    run_config: RunConfigOption = None,
    engine: Annotated[
        Engine,
        typer.Option(help="Flower's simulation on Ray, or this process alone."),
    ] = Engine.FLWR,
    nodes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Simulated nodes; default: one per GPU or, without GPUs, core."
        ),
    ] = None,
    verbose: VerboseOption = False,
) -> None:
    """Run a method. The exit status is 0 only if the run completes."""
    with ending_cleanly():
        if folder is not None and not folder.is_dir():
            allowed = f"a folder; run config values follow -c: -c {folder}"
            raise refuse("FOLDER", str(folder), allowed)
        _start(merge_values(run_config), engine, folder, nodes, verbose)


def resume(
    run: Annotated[
        str | None,
        typer.Argument(
            help="RUN as for `slora report`; default: the newest run there that ended "
            "early and left a checkpoint."
        ),
    ] = None,
    run_config: RunConfigOption = None,
    engine: Annotated[
        Engine | None, typer.Option(help="As for `slora run`; default: the run's.")
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(min=1, help="Simulated nodes; default: as many as the run had."),
    ] = None,
    folder: FolderOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Resume an interrupted run from its last checkpoint, with its own config."""
    from slora_flwr.runs.reader import find_resumable, find_run, read_run

    with ending_cleanly():
        given = merge_values(run_config)
        if run is None and "run.resume" in given:  # which names the run too
            run = str(parse({"run.resume": given["run.resume"]}).run.resumed)
        path = find_resumable() if run is None else find_run(run)
        if run is None:
            typer.echo(f"Resuming {path.name}")
        recorded = read_run(path)
        had = recorded.engine
        if recorded.state == "running":
            raise refuse("RUN", path.name, "a run that no process is making")
        if recorded.state == "finished" and not given:
            allowed = "a run that has not finished; or -c run.resume with a checkpoint "
            allowed += "of this one, to hold the rounds after it again"
            raise refuse("RUN", path.name, allowed)
        if engine is None and had.name == "deployment":
            allowed = "for a run of nodes elsewhere: flwr run with run.resume (docs, "
            allowed += "Resuming), or here --engine, which simulates its nodes"
            raise refuse("RUN", path.name, allowed)
        values = read_file(path / "config.toml") | {"run.resume": str(path.absolute())}
        values |= given
        _start(
            values,
            engine or Engine(had.name),
            folder,
            nodes or had.nodes,
            verbose,
        )


def _start(
    values: Mapping[str, Value],
    engine: Engine,
    folder: Path | None,
    nodes: int | None,
    verbose: bool,
) -> None:
    parse(values)  # Invalid values are refused here, before anything starts.
    if engine is Engine.INLINE:
        _run_inline(values, nodes or 1)
    else:
        _run_flower(folder, values, nodes, verbose)


def _run_inline(values: Mapping[str, Value], nodes: int) -> None:
    # Imported here, since torch and transformers take seconds.
    from slora_flwr.adapters.priming import HandoffError
    from slora_flwr.engines.inline import run_inline
    from slora_flwr.runs.writing import RunDirectoryError
    from slora_flwr.server.fleet import FleetError
    from slora_flwr.server.strategy import TooFewRepliesError

    failures = (FleetError, HandoffError, RunDirectoryError, TooFewRepliesError)
    with heeding_sigterm(), ending_cleanly(*failures):
        run_inline(values, nodes)


def _run_flower(
    folder: Path | None, values: Mapping[str, Value], nodes: int | None, verbose: bool
) -> None:
    from slora_flwr.engines.app_folder import app_folder
    from slora_flwr.engines.flower import FlowerError, run_flower

    with ending_cleanly(FlowerError), app_folder(folder) as app:
        run_flower(app, values, nodes, _may_go_on, verbose)


def _may_go_on(run_id: str) -> bool:
    """Return whether an interrupted command leaves its run running; ask if possible."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    question = f"\nStop run {run_id}, or leave it running? [S/l] (Ctrl-C stops it) "
    try:
        return input(question).strip().lower().startswith("l")
    except KeyboardInterrupt:
        return False
    except EOFError:  # the terminal is gone
        return True
