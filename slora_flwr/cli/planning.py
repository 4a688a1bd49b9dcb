"""`slora plan` and `slora config`: run configs that are looked at, not run."""

import typer

from slora_flwr.cli.options import RunConfigOption, ending_cleanly
from slora_flwr.config import ConfigError, parse
from slora_flwr.config.arguments import merge_arguments


def plan(run_config: RunConfigOption = None) -> None:
    """Print what a run would train, send and need in memory, without training."""
    with ending_cleanly(ValueError, OSError):
        config = parse(merge_arguments(run_config or []))
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


def show_config(run_config: RunConfigOption = None) -> None:
    """Print a TOML file of all keys with their help, for `slora run -c FILE`."""
    from slora_flwr.config.template import write_template

    with ending_cleanly():
        config = parse(merge_arguments(run_config or []))
        typer.echo(write_template(config), nl=False)
