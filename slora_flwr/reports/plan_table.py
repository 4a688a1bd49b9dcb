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

# Megabits a second, as links are sold.
SPEEDS = {"10 Mbit/s": 10, "100 Mbit/s": 100, "1 Gbit/s": 1000}


def plan_tables(
    config: RunConfig, backbone: Backbone, clients: list[int]
) -> tuple[Table, Table, Table]:
    """Return tables of what a run trains and sends, beside full fine-tuning and LoRA.

    The last has the time that a client's bytes take.

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
    first, *others = SPEEDS
    takes = _begin("", f"seconds at\n{first}", *(f"\n{name}" for name in others))
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
            seconds = (
                transfer_seconds((down + up) / turns, s) for s in SPEEDS.values()
            )
            takes.add_row(label, *(short(time) for time in seconds))
        for table in (trains, sends, takes):
            table.add_section()
    trains.caption = (
        "a client's peak in a step of a full batch: weights, copies of them, masks, "
        "trained values, moments, the state sent, and activations or gradients"
    )
    sends.caption = (
        "bytes of the tensors if the whole cohort answers, counting each client as if "
        "it were a separate node"
    )
    takes.caption = (
        "a client's transfers in a round, both ways, if its link does nothing else"
    )
    return trains, sends, takes


def transfer_seconds(size: float, speed: float) -> float:
    """Return how long bytes take over a link of so many megabits a second."""
    return 8 * size / (speed * 1e6)


def short(seconds: float) -> str:
    """Return seconds with two digits that tell, whole from ten on."""
    if seconds >= 9.95:
        return f"{seconds:,.0f}"
    return f"{seconds:.1f}" if seconds >= 0.95 else f"{seconds:.2g}"


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
