"""The command line: `slora`."""

import json
import math
import os
import subprocess
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from flwr.common.config import parse_config_args

from slora_flwr.config import ConfigError, parse

app = typer.Typer(
    help="Federated fine-tuning of transformers: SLoRA and its peers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class Engine(StrEnum):
    """What carries the messages of a run."""

    FLWR = "flwr"
    INLINE = "inline"


@app.callback()
def main() -> None:
    """Take the options that all commands share, of which there are none."""


@app.command()
def run(
    folder: Annotated[
        Path, typer.Argument(help="Folder of the app: a checkout of slora-flwr.")
    ] = Path(),
    run_config: Annotated[
        list[str] | None,
        typer.Option(
            "--run-config",
            "-c",
            help="As `flwr run` takes it: 'key=value key2=value2', or one TOML file.",
        ),
    ] = None,
    engine: Annotated[
        Engine,
        typer.Option(help="Flower's simulation on Ray, or all in this process."),
    ] = Engine.FLWR,
    nodes: Annotated[
        int | None,
        typer.Option(min=1, help="Simulated nodes; one per GPU, or else per core."),
    ] = None,
) -> None:
    """Run a method; the exit status says whether it ended well."""
    try:
        values = parse_config_args(run_config)
        # Refused here, before anything starts.
        parse(values)
    except (ConfigError, ValueError, OSError, click.ClickException) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    if engine is Engine.INLINE:
        _run_inline(values, nodes or 1)
    else:
        _run_flower(folder, run_config or [], nodes)


@app.command()
def plan(
    run_config: Annotated[
        list[str] | None,
        typer.Option("--run-config", "-c", help="As `flwr run` takes it."),
    ] = None,
) -> None:
    """Say what a run would train, send and need in memory; nothing is trained."""
    try:
        config = parse(parse_config_args(run_config))
        from rich.console import Console

        from slora_flwr.reports.plan_table import plan_table
        from slora_flwr.training.worker import Worker

        labels = [name.strip() for name in config.data.labels.split(",")]
        if config.data.is_own and not config.data.labels:
            raise ConfigError(
                "data.labels is ''; allowed: the label names, with commas, without "
                "which the head's size is not known before the nodes are"
            )
        worker = Worker(config, labels if config.data.is_own else ())
        Console().print(plan_table(config, worker.backbone))
    except (ConfigError, ValueError, OSError, click.ClickException) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


@app.command("config")
def show_config(
    run_config: Annotated[
        list[str] | None,
        typer.Option(
            "--run-config", "-c", help="What differs, as `flwr run` takes it."
        ),
    ] = None,
) -> None:
    """Print a TOML file of every key, with its help, for `slora run -c FILE`."""
    from slora_flwr.config.template import write_template

    try:
        config = parse(parse_config_args(run_config))
    except (ConfigError, ValueError, OSError, click.ClickException) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(write_template(config), nl=False)


@app.command()
def sweep(
    study: Annotated[
        Path, typer.Argument(help="TOML file, such as experiments/skew.toml.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for its runs; else results/<study> beside the file."),
    ] = None,
    keep_states: Annotated[
        bool, typer.Option(help="Keep checkpoints and models of finished runs.")
    ] = False,
) -> None:
    """Make every run of a study that is not finished yet, several at once."""
    from slora_flwr.studies.sweep import sweep as sweep_study

    try:
        failed = sweep_study(study, out, keep_states)
    except ConfigError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    if failed:
        typer.echo(f"Error: failed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


@app.command()
def report(
    run: Annotated[
        str | None,
        typer.Argument(
            help="Run directory, or its name below $SLORA_HOME/runs; else the newest."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; else report.html in the run directory."),
    ] = None,
) -> None:
    """Write a page on one run: figures, bytes, curves, clients, failures, config."""
    from slora_flwr.reports.page import render
    from slora_flwr.reports.run_page import report as lay_out
    from slora_flwr.runs.reader import RunError, find_run, read_run

    try:
        path = find_run(run)
        page = lay_out(read_run(path))
    except RunError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    out = out or path / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render(page))
    typer.echo(out)


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Run directories, their names below $SLORA_HOME/runs, or folders that "
            "hold some.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for compare.html and its tables.")
    ] = Path("comparison"),
    target: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Accuracy whose bytes and time to compare; else a point below fft's.",
        ),
    ] = None,
    uplink: Annotated[
        str, typer.Option(help="Mbit/s of the modelled times, with commas.")
    ] = "1,10,100",
) -> None:
    """Compare runs on one page: those that differ by the seed alone are one group."""
    from slora_flwr.reports.comparison_page import compare as lay_out
    from slora_flwr.reports.page import write
    from slora_flwr.runs.reader import RunError, find_runs, read_run

    try:
        rates = [float(rate) for rate in uplink.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < math.inf for rate in rates):
        allowed = "numbers above 0 with commas, in Mbit/s"
        typer.echo(f"Error: --uplink is {uplink!r}; allowed: {allowed}", err=True)
        raise typer.Exit(2)
    try:
        found = [read_run(path) for path in find_runs(runs)]
    except RunError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(write(lay_out(found, rates, target), out, "compare"))


def _run_inline(values: dict[str, Any], nodes: int) -> None:
    # torch and transformers take seconds to import, which an error above need not wait.
    from slora_flwr.adapters.priming import HandoffError
    from slora_flwr.engines.inline import InlineGrid
    from slora_flwr.runs.directory import RunDirectoryError
    from slora_flwr.server.fleet import FleetError
    from slora_flwr.server.run import run as run_on
    from slora_flwr.server.strategy import TooFewRepliesError

    run_id = time.time_ns()
    try:
        run_on(InlineGrid(values, nodes, run_id), values, run_id)
    except ConfigError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    except (FleetError, HandoffError, RunDirectoryError, TooFewRepliesError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


def _run_flower(folder: Path, run_config: list[str], nodes: int | None) -> None:
    if not (folder / "pyproject.toml").is_file():
        typer.echo(
            f"Error: {folder.absolute()} holds no Flower app; allowed: a checkout of "
            "slora-flwr, or --engine inline",
            err=True,
        )
        raise typer.Exit(2)
    command = ["run", str(folder), "--format", "json"]
    for value in run_config:
        command += ["--run-config", value]
    gpus = _gpus()
    nodes = nodes or gpus or os.cpu_count() or 1
    # Ray takes a part of a GPU, or whole ones.
    share = min(1.0, gpus / nodes)
    resources = f"client-resources-num-cpus=1 client-resources-num-gpus={share}"
    command += ["--federation-config", f"num-supernodes={nodes} {resources}"]
    started = _flower(*command)
    run_id = str(started["run-id"])
    streamed = subprocess.run([*_FLOWER, "log", run_id, "--stream"], check=False)
    listed = _flower("list", "--run-id", run_id, "--format", "json")
    status = listed["runs"][0]["status"]
    # `flwr log` ends with 0 whatever became of the run.
    if status != "finished:completed" or streamed.returncode:
        typer.echo(f"Error: run {run_id} is {status}", err=True)
        raise typer.Exit(1)


_FLOWER = (sys.executable, "-m", "flwr.cli.app")


def _flower(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [*_FLOWER, *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    try:
        answer = json.loads(done.stdout)
    except json.JSONDecodeError:
        answer = {"success": False, "error-message": done.stdout.strip()}
    if done.returncode or not answer.get("success"):
        typer.echo(f"Error: {answer.get('error-message', 'flwr failed')}", err=True)
        raise typer.Exit(done.returncode or 1)
    return dict(answer)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
