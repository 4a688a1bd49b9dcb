"""`slora plan` and `slora config`: run configs that are looked at, not run."""

from typing import Annotated

import typer

from slora_flwr.cli.options import RunConfigOption, ending_cleanly, merge_values
from slora_flwr.config import parse

_OUTLINE = (
    "Planned from config.json, without weights. Their digest, by which server and "
    "nodes compare their models, is therefore unknown; a union of several rounds' "
    "masks has its expected size."
)


def plan(
    run_config: RunConfigOption = None,
    labels: Annotated[
        int | None,
        typer.Option(min=2, max=1000, help="Assumed number of labels of nodes' data."),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Assumed number of nodes with data of their own; default: as many as "
            "train in a round.",
        ),
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(min=1, help="Assumed number of examples of each such node."),
    ] = None,
    no_weights: Annotated[
        bool,
        typer.Option(
            "--no-weights",
            help="Plan from the model's config.json and tokenizer alone: weights are "
            "neither downloaded nor loaded. So it is anyway if the model's folder has "
            "none.",
        ),
    ] = False,
) -> None:
    """Print what a run would train, send and need in memory, without training.

    What the run would refuse of its config and its data is refused here too. What only
    nodes know, if data.name is 'node', can be assumed.
    """
    with ending_cleanly(ValueError, OSError):
        config = parse(merge_values(run_config))
        from rich.console import Console

        from slora_flwr.backbone.load import has_weights
        from slora_flwr.planning.assumptions import Assumptions, unchecked
        from slora_flwr.planning.outline import outline
        from slora_flwr.reports.narrow_tables import print_table
        from slora_flwr.reports.plan_table import plan_tables
        from slora_flwr.tasks.choice import find_task
        from slora_flwr.training.trainer import Trainer

        assumed = Assumptions(labels, nodes, examples)
        assumed.check(config)
        find_task(config).check(config)
        classes = assumed.classes(config)
        is_outline = no_weights or not has_weights(config.model)
        if is_outline:
            backbone = outline(config, classes)
        else:
            trainer = Trainer(config, classes)
            trainer.data.check()
            _ = trainer.probes  # whose files are read and checked
            backbone = trainer.model.backbone
        planned, clients = assumed.in_batches(config), assumed.clients(config)
        console = Console()
        for table in plan_tables(planned, backbone, clients):
            print_table(console, table)
        if is_outline:
            typer.echo(_OUTLINE)
        for told in filter(None, (assumed.tell(config), unchecked(config))):
            typer.echo(told)


def show_config(run_config: RunConfigOption = None) -> None:
    """Print a TOML file of all keys with their help, for `slora run -c FILE`."""
    from slora_flwr.config.template import write_template

    with ending_cleanly():
        config = parse(merge_values(run_config))
        typer.echo(write_template(config), nl=False)
