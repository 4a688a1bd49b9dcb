"""`slora sweep`: the runs of a study."""

from pathlib import Path
from typing import Annotated

import typer

from slora_flwr.cli.options import (
    RunConfigOption,
    ending_cleanly,
    fail,
    heeding_sigterm,
    merge_values,
)


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
    run_config: RunConfigOption = None,
    keep_states: Annotated[
        bool, typer.Option(help="Keep checkpoints and models of finished runs.")
    ] = False,
) -> None:
    """Execute all unfinished runs of a study, several at once."""
    from slora_flwr.studies.sweep import sweep as sweep_study

    with heeding_sigterm(), ending_cleanly():
        changes = merge_values(run_config)
        failed = sweep_study(study, out, keep_states, changes)
    if failed:
        raise fail(f"failed: {', '.join(failed)}", 1)
