"""`slora runs`, `report` and `compare`: runs that are looked at. None needs torch."""

import math
from pathlib import Path
from typing import Annotated

import typer

from slora_flwr.cli.options import RunArgument, ending_cleanly, fail
from slora_flwr.common.files import home
from slora_flwr.common.text import shorten
from slora_flwr.config import ConfigError, refuse


def runs(
    folders: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FOLDER]...",
            help="Folders below which to look, for runs with run.dir; default: "
            "$SLORA_HOME/runs.",
        ),
    ] = None,
) -> None:
    """List the runs in $SLORA_HOME/runs, or below folders, the newest first.

    Each has its state, method, data, result, bytes and age. Of runs that ended early,
    those with the state `no checkpoint` cannot be resumed.
    """
    from rich.console import Console

    from slora_flwr.reports.narrow_tables import print_table
    from slora_flwr.reports.runs_table import runs_table
    from slora_flwr.runs.reader import list_runs

    with ending_cleanly():
        found = list_runs(folders or ())
        if found:
            print_table(Console(), runs_table(found))
        else:
            typer.echo(
                f"There are no runs below {home() / 'runs'}. `slora run` makes one "
                "there; `slora runs FOLDER` lists those below another folder."
            )


def report(
    run: RunArgument = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; default: report.html in the run directory."),
    ] = None,
) -> None:
    """Write a report on one run: metrics, bytes, curves, clients, failures, config."""
    from slora_flwr.reports.page import write_page
    from slora_flwr.reports.run_page import report as lay_out
    from slora_flwr.runs.reader import find_run, read_run

    with ending_cleanly():
        path = find_run(run)
        page = lay_out(read_run(path))
    out = out or path / "report.html"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_page(page, out)
    except OSError as error:
        raise fail(f"{out} cannot be written ({error})", 1) from error
    typer.echo(out)


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
            help="Accuracy or, of language models, perplexity at which to compare "
            "bytes and time; default: a point below fft's, or 1% above.",
        ),
    ] = None,
    last: Annotated[
        int,
        typer.Option(
            min=1,
            help="How many of a run's last evaluations are averaged, for the table of "
            "results, the default target, and differences between methods.",
        ),
    ] = 5,
    uplink: Annotated[
        str,
        typer.Option(help="Rates of the modelled times in Mbit/s, comma-separated."),
    ] = "1,10,100",
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--name",
            metavar="GROUP=NAME",
            help="Name of a group, which is given as the page labels it without, or by "
            "the name of one of its runs. May be repeated.",
        ),
    ] = None,
) -> None:
    """Compare runs on one page, grouping those that differ only in the seed.

    Runs in a study's folder that the study no longer has are left out, unless RUN names
    them.
    """
    from slora_flwr.reports.comparison_page import compare as lay_out
    from slora_flwr.reports.page import write
    from slora_flwr.runs.reader import find_current, read_run

    try:
        rates = [float(rate) for rate in uplink.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < math.inf for rate in rates):
        allowed = "comma-separated numbers above 0, in Mbit/s"
        raise fail(f"--uplink is {uplink!r}; allowed: {allowed}", 2)
    with ending_cleanly():
        labels = dict(map(_split_name, names or []))
        paths, left_out = find_current(runs)
        found = [read_run(path) for path in paths]
        told = [_tell_left_out(*item) for item in left_out.items()]
        for line in told:
            typer.echo(line, err=True)
        if not found:
            raise ConfigError(f"RUN is {' '.join(runs)}; allowed: runs of a study")
        page = lay_out(found, rates, target, labels, told, out, last)
    try:
        typer.echo(write(page, out, "compare"))
    except OSError as error:
        raise fail(f"{out} cannot be written ({error})", 1) from error


def _split_name(given: str) -> tuple[str, str]:
    # A label may have equals signs.
    group, equals, name = given.rpartition("=")
    if not (group and equals and name.strip()):
        raise refuse("--name", given, "GROUP=NAME")
    return group, name


def _tell_left_out(folder: Path, paths: list[Path]) -> str:
    names = ", ".join(shorten([path.name for path in paths]))
    return (
        f"Left out of {folder}, whose study, as it was last swept, does not have them: "
        f"{names}. To compare them too, give them as RUN."
    )
