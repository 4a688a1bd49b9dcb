"""The tables of a run's plan, compared with full fine-tuning and LoRA."""

from collections.abc import Iterator
from dataclasses import replace

from rich.table import Table

from slora_flwr.backbone.load import Backbone
from slora_flwr.common.random import sample_cohort
from slora_flwr.common.text import counted
from slora_flwr.config import (
    ConfigError,
    DownloadConfig,
    LoraConfig,
    RunConfig,
    UploadConfig,
)
from slora_flwr.config.methods import REFERENCES
from slora_flwr.config.rules import check
from slora_flwr.config.schedule import Phase, make_schedule
from slora_flwr.planning.memory import plan_memory
from slora_flwr.planning.rounds import plan_rounds


def plan_tables(
    config: RunConfig, backbone: Backbone, clients: list[int]
) -> tuple[Table, Table]:
    """Return tables of what a run trains and sends, beside full fine-tuning and LoRA.

    Parameters
    ----------
    config : RunConfig
        The run.
    backbone : Backbone
        The run's backbone, with nothing attached.
    clients : list[int]
        The client population.
    """
    title = f"{config.method}: {counted(config.rounds, 'round')}"
    trains = _begin(title, "rounds", "trained values", "of the model", "MB of memory")
    sends = _begin("", "kB a client:\ndown", "\nup", "MB in all:\ndown", "\nup")
    for name, other in _variants(config):
        rounds = plan_rounds(other, backbone, clients)
        cohort = len(sample_cohort(clients, config.clients.per_round, 0, 1))
        for index, phase in enumerate(make_schedule(other)):
            own = [r for r in rounds if r.phase == index]
            down, up = sum(r.down for r in own), sum(r.up for r in own)
            turns = len(own) * cohort
            trained = _trained_values(phase, other, backbone)
            memory = plan_memory(phase, other, backbone)
            label = name if name in REFERENCES else f"{phase.adapter} phase"
            trains.add_row(
                label,
                f"{'up to ' if phase.is_open else ''}{len(own)}",
                f"{trained:,}",
                f"{trained / backbone.size:.2%}",
                f"{memory.total / 1e6:,.0f}",
            )
            sends.add_row(
                label,
                f"{down / turns / 1e3:,.1f}",
                f"{up / turns / 1e3:,.1f}",
                f"{down / 1e6:,.2f}",
                f"{up / 1e6:,.2f}",
            )
        trains.add_section()
        sends.add_section()
    trains.caption = (
        "a client's memory in one step: weights and copies of them, trained values "
        "with gradients and moments, activations of a full batch"
    )
    sends.caption = (
        "bytes of the tensors if the whole cohort answers, counting each client as if "
        "it were a separate node"
    )
    return trains, sends


def _begin(title: str, *headings: str) -> Table:
    """Return a table without rows."""
    table = Table(title=title or None)
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _trained_values(phase: Phase, config: RunConfig, backbone: Backbone) -> int:
    """Return how many values a client of the largest rank returns."""
    config = replace(config, lora=replace(config.lora, ranks=""))
    _, trained = phase.adapter_type.traffic(phase, config, backbone, 1, 0)
    return int(trained)


def _variants(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    yield config.method, config
    usual = LoraConfig()
    plain = replace(
        config.lora, aggregator=usual.aggregator, start=usual.start, ranks=usual.ranks
    )
    config = replace(config, upload=UploadConfig(), download=DownloadConfig())
    for name in REFERENCES:
        other = replace(config, method=name, lora=plain)
        if name != config.method and _can_run(other):
            yield name, other


def _can_run(config: RunConfig) -> bool:
    """Return whether a config is valid; `fft` needs float32 weights, for example."""
    try:
        check(config)
    except ConfigError:
        return False
    return True
