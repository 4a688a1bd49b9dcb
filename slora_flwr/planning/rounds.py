"""What a run will train, send and need in memory, from its config alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from slora_flwr.adapters.handoff import base_layout
from slora_flwr.adapters.size import factors_size, state_size, targets_size, traffic
from slora_flwr.backbone.load import Backbone
from slora_flwr.common.random import sample_cohort
from slora_flwr.config import RunConfig
from slora_flwr.config.schedule import Phase, make_schedule
from slora_flwr.planning.holdings import Holdings
from slora_flwr.wire.codec import Codec


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


def population(config: RunConfig) -> list[int]:
    """List the clients; with one for each node, as many as a cohort has."""
    return list(range(config.clients.count or config.clients.per_round))
