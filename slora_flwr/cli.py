"""The command line: `slora`."""

import math
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
    """The engines of `slora run`."""

    FLWR = "flwr"
    INLINE = "inline"


@app.callback()
def main() -> None:
    """Accept the options shared by all commands, of which there are none."""


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
            help="As for `flwr run`: 'key=value key2=value2', or one TOML file.",
        ),
    ] = None,
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
) -> None:
    """Run a method. The exit status is 0 only if the run completes."""
    try:
        values = parse_config_args(run_config)
        # Invalid values are refused here, before anything starts.
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
        typer.Option("--run-config", "-c", help="As for `flwr run`."),
    ] = None,
) -> None:
    """Print what a run would train, send and need in memory, without training."""
    try:
        config = parse(parse_config_args(run_config))
        from rich.console import Console

        from slora_flwr.reports.plan_table import plan_table
        from slora_flwr.training.trainer import Trainer

        if config.data.is_own and not config.data.labels:
            raise ConfigError(
                "data.labels is ''; allowed: the label names, separated by commas: "
                "without them the head's size is unknown until nodes answer"
            )
        trainer = Trainer(config, config.data.label_names if config.data.is_own else ())
        Console().print(plan_table(config, trainer.model.backbone))
    except (ConfigError, ValueError, OSError, click.ClickException) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


@app.command("config")
def show_config(
    run_config: Annotated[
        list[str] | None,
        typer.Option("--run-config", "-c", help="Values to change, as for `flwr run`."),
    ] = None,
) -> None:
    """Print a TOML file of all keys with their help, for `slora run -c FILE`."""
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
        typer.Option(
            help="Folder for the runs; default: results/<study> beside the file."
        ),
    ] = None,
    keep_states: Annotated[
        bool, typer.Option(help="Keep checkpoints and models of finished runs.")
    ] = False,
) -> None:
    """Execute all unfinished runs of a study, several at once."""
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
            help="Run directory, or its name below $SLORA_HOME/runs; default: the "
            "newest."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; default: report.html in the run directory."),
    ] = None,
) -> None:
    """Write a report on one run: metrics, bytes, curves, clients, failures, config."""
    from slora_flwr.reports.page import write_page
    from slora_flwr.reports.run_page import report as lay_out
    from slora_flwr.runs.reader import RunError, find_run, read_run

    try:
        path = find_run(run)
        page = lay_out(read_run(path))
    except RunError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    out = out or path / "report.html"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_page(page, out)
    except OSError as error:
        typer.echo(f"Error: {out} cannot be written ({error})", err=True)
        raise typer.Exit(1) from error
    typer.echo(out)


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Run directories, their names below $SLORA_HOME/runs, or folders of "
            "run directories.",
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
            help="Accuracy at which to compare bytes and time; default: a point below "
            "fft's.",
        ),
    ] = None,
    uplink: Annotated[
        str,
        typer.Option(help="Rates of the modelled times in Mbit/s, comma-separated."),
    ] = "1,10,100",
) -> None:
    """Compare runs on one page, grouping those that differ only in the seed."""
    from slora_flwr.reports.comparison_page import compare as lay_out
    from slora_flwr.reports.page import write
    from slora_flwr.runs.reader import RunError, find_runs, read_run

    try:
        rates = [float(rate) for rate in uplink.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < math.inf for rate in rates):
        allowed = "comma-separated numbers above 0, in Mbit/s"
        typer.echo(f"Error: --uplink is {uplink!r}; allowed: {allowed}", err=True)
        raise typer.Exit(2)
    try:
        found = [read_run(path) for path in find_runs(runs)]
        page = lay_out(found, rates, target)
    except (ConfigError, RunError) as error:  # the former of a method from outside
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    try:
        typer.echo(write(page, out, "compare"))
    except OSError as error:
        typer.echo(f"Error: {out} cannot be written ({error})", err=True)
        raise typer.Exit(1) from error


def _run_inline(values: dict[str, Any], nodes: int) -> None:
    # Imported here, since torch and transformers take seconds.
    from slora_flwr.adapters.priming import HandoffError
    from slora_flwr.engines.inline import run_inline
    from slora_flwr.runs.writing import RunDirectoryError
    from slora_flwr.server.fleet import FleetError
    from slora_flwr.server.strategy import TooFewRepliesError

    try:
        run_inline(values, nodes)
    except ConfigError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    except (FleetError, HandoffError, RunDirectoryError, TooFewRepliesError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


def _run_flower(folder: Path, run_config: list[str], nodes: int | None) -> None:
    from slora_flwr.engines.flower import FlowerError, run_flower

    try:
        run_flower(folder, run_config, nodes)
    except (ConfigError, FlowerError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from error
