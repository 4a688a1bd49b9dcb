"""What a run will train, send and need in memory, from its config alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from rich.table import Table
from torch import Tensor

from slora_flwr.adapters import make_adapter
from slora_flwr.adapters.handoff import base_layout
from slora_flwr.adapters.size import factors_size, state_size, targets_size, traffic
from slora_flwr.config import DownloadConfig, RecipeConfig, RunConfig, UploadConfig
from slora_flwr.models.backbone import Backbone
from slora_flwr.schedule import Phase, make_schedule
from slora_flwr.server.base import Holdings
from slora_flwr.server.fleet import sample_cohort
from slora_flwr.training.loop import precision_of
from slora_flwr.wire.codec import Codec

# What a run is held against, in the same rounds.
REFERENCES = ("fft", "lora")


@dataclass(frozen=True)
class PlannedRound:
    """Bytes of one round's tensors if the whole cohort answers, before compression.

    `phase` is the phase's index; `down` and `up` count each client as if it were a node
    of its own, as the ledger's payload bytes do.
    """

    number: int
    phase: int
    down: int
    up: int


@dataclass(frozen=True)
class Memory:
    """Bytes that a client's training step needs, by what they are for.

    Attributes
    ----------
    weights : int
        The resident backbone.
    trained : int
        Trained values that the backbone does not hold, all gradients, and the
        optimiser's moments.
    activations : int
        What a forward pass of one full batch keeps for the backward pass.
    aside : int
        Copies of W_0's weights that the phase changes, to give them back.
    """

    weights: int
    trained: int
    activations: int
    aside: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.trained + self.activations + self.aside


def plan_rounds(
    config: RunConfig,
    backbone: Backbone,
    clients: list[int],
    lengths: Sequence[int] = (),
) -> list[PlannedRound]:
    """Predict the payload bytes of every round.

    Parameters
    ----------
    config : RunConfig
        The run. An open phase is taken to last as long as it may.
    backbone : Backbone
        Shapes, whatever is attached.
    clients : list[int]
        The client population: the seed tells who is drawn in which round, and so who
        lacks what of a phase's base. With privacy nobody can tell: the seed's cohorts,
        of the size expected, stand in.
    lengths : Sequence[int]
        Rounds of each phase, where that is known better than from the config.
    """
    rounds = []
    number = 0
    head = state_size("head", config, backbone)
    schedule = make_schedule(config)
    lengths = lengths or [phase.rounds for phase in schedule]
    for index, phase in enumerate(schedule):
        before = number
        down_codec = Codec.of_download(config.download, head)
        up_codec = Codec.of_upload(config.upload, phase.adapter, head)
        start = start_size(phase, config, backbone, before)
        matrices = 4 * targets_size(backbone)
        base_codec = replace(down_codec, head=0)
        holdings = Holdings(base_codec.size(start) if start else 0, matrices)
        for phase_round in range(1, lengths[index] + 1):
            number += 1
            per_round = config.clients.per_round
            cohort = sample_cohort(clients, per_round, config.seed, number)
            ranks = {client: config.lora.rank_of(client) for client in cohort}
            sizes = {
                rank: traffic(phase, config, backbone, phase_round, rank)
                for rank in {*ranks.values()}
            }
            down = up = 0
            for client in cohort:
                sent, back = sizes[ranks[client]]
                down += down_codec.size(sent) + holdings.owed(client)
                up += up_codec.size(back)
            rounds.append(PlannedRound(number, index, down, up))
            holdings.moves.append(4 * move_size(phase, config, backbone, len(cohort)))
    return rounds


def start_size(
    phase: Phase, config: RunConfig, backbone: Backbone, rounds_before: int
) -> int:
    """Count the values of the base that a phase starts from, 0 for W_0."""
    if phase.adapter != "lora":
        return 0
    shapes, _, _ = base_layout(phase, config, backbone, rounds_before)
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def move_size(phase: Phase, config: RunConfig, backbone: Backbone, cohort: int) -> int:
    """Count the values by which a round moves the base, for `exact` at most."""
    if not phase.moves_base:
        return 0
    if phase.adapter == "sparse":
        head = state_size("head", config, backbone)
        return state_size("sparse", config, backbone) - head
    # The mean of the products lacks the products of the clients' deviations from the
    # means, and one client's deviations follow from the others'.
    sides = [min(m.weight.shape) for m in backbone.targets.values()]
    rank = min(max(0, cohort - 1) * config.lora.rank, max(sides))
    return factors_size(rank, backbone)


def plan_memory(phase: Phase, config: RunConfig, backbone: Backbone) -> Memory:
    """Measure what a training step of a phase needs, by one forward pass.

    Parameters
    ----------
    phase : Phase
        One of the schedule's.
    config : RunConfig
        The run.
    backbone : Backbone
        With W_0 resident and nothing attached, before and after.
    """
    adapter = make_adapter(phase.adapter, config)
    resident = {p.untyped_storage().data_ptr() for p in backbone.model.parameters()}
    adapter.attach(backbone)
    adapter.begin(1)
    parameters = adapter.parameters()
    trained = sum(parameter.numel() for parameter in parameters)
    beside = sum(
        parameter.numel()
        for parameter in parameters
        if parameter.untyped_storage().data_ptr() not in resident
    )
    # Adam has two moments, and SGD one with momentum.
    moments = 2 if phase.recipe.optimizer == "adamw" else phase.recipe.momentum > 0
    kept = _activation_bytes(backbone, phase.recipe, config.data.max_length)
    adapter.detach()
    weights = sum(p.numel() * p.element_size() for p in backbone.model.parameters())
    aside = 0
    if phase.adapter == "full":
        aside = weights
    elif phase.moves_base or start_size(phase, config, backbone, 1):
        aside = 4 * targets_size(backbone)
    return Memory(weights, 4 * (beside + (1 + moments) * trained), kept, aside)


def _activation_bytes(backbone: Backbone, recipe: RecipeConfig, length: int) -> int:
    """Count what a forward pass on a batch keeps, weights apart."""
    model = backbone.model.train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    size = (recipe.batch_size, length)
    ids = torch.ones(size, dtype=torch.long, device=backbone.device)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, precision_of(backbone, recipe.precision):
        # Held until counted: freed storages would be counted as one another.
        kept = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    del kept
    return sum(storages.values())


def plan_table(config: RunConfig, backbone: Backbone) -> Table:
    """Lay out the plan of a run beside full fine-tuning and LoRA.

    Parameters
    ----------
    config : RunConfig
        The run.
    backbone : Backbone
        Its backbone, with nothing attached.
    """
    table = Table(
        title=f"{config.method}: {config.rounds} rounds", title_justify="left"
    )
    table.add_column("")
    for name in (
        "rounds",
        "trained values",
        "of the model",
        "kB a client: down",
        "up",
        "MB in all: down",
        "up",
        "MB of a client's memory",
    ):
        table.add_column(name, justify="right")
    for name, other in _variants(config):
        rounds = plan_rounds(other, backbone, population(other))
        cohort = len(sample_cohort(population(other), config.clients.per_round, 0, 1))
        for index, phase in enumerate(make_schedule(other)):
            own = [r for r in rounds if r.phase == index]
            down, up = sum(r.down for r in own), sum(r.up for r in own)
            turns = len(own) * cohort
            _, trained = traffic(phase, other, backbone, 1, other.lora.rank)
            memory = plan_memory(phase, other, backbone)
            table.add_row(
                name if name in REFERENCES else f"{phase.adapter} phase",
                f"{'up to ' if phase.is_open else ''}{len(own)}",
                f"{trained:,}",
                f"{trained / backbone.size:.2%}",
                f"{down / turns / 1e3:,.1f}",
                f"{up / turns / 1e3:,.1f}",
                f"{down / 1e6:,.2f}",
                f"{up / 1e6:,.2f}",
                f"{memory.total / 1e6:,.0f}",
            )
        table.add_section()
    table.caption = (
        "bytes of the tensors, each client as if it were a node of its own, if all of "
        "a cohort answer; memory of one step: weights, those kept aside, trained "
        "values with gradients and moments, activations of a full batch"
    )
    return table


def population(config: RunConfig) -> list[int]:
    """List the clients; with one for each node, as many as a cohort has."""
    return list(range(config.clients.count or config.clients.per_round))


def _variants(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    yield config.method, config
    plain = replace(config.lora, aggregator="fedavg", start="peft", ranks="")
    config = replace(config, upload=UploadConfig(), download=DownloadConfig())
    for name in REFERENCES:
        # Full fine-tuning wants float32 weights, so another backbone.
        fits = name != "fft" or config.model.dtype == "float32"
        if name != config.method and fits:
            yield name, replace(config, method=name, lora=plain)
