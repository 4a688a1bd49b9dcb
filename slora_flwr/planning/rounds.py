"""The bytes that a run will send, round by round, predicted from its config."""

from collections.abc import Sequence
from dataclasses import dataclass

from slora_flwr.aggregation.ring_sum import masked_bytes
from slora_flwr.backbone.load import Backbone
from slora_flwr.common.random import sample_cohort
from slora_flwr.config import RunConfig
from slora_flwr.config.schedule import make_schedule
from slora_flwr.planning.version_bytes import VersionBytes
from slora_flwr.wire.base_codec import BaseCodec
from slora_flwr.wire.codec import Codec


@dataclass(frozen=True)
class PlannedRound:
    """Bytes of one round's tensors if the whole cohort answers, before compression.

    `phase` is the index of the phase. Like the ledger's payload bytes, `down` and `up`
    count each client as if it were a separate node.
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
        The run. An open phase is assumed to last as long as allowed.
    backbone : Backbone
        The backbone, with any adapter attached.
    clients : list[int]
        The client population. The seed determines each round's cohort, and so what
        each client lacks of a phase's base. With privacy, cohorts are secret, and the
        seed's cohorts of the expected size stand in.
    lengths : Sequence[int]
        Number of rounds of each phase, if known better than from the config.
    """
    rounds = []
    number = 0
    head = backbone.head_size
    schedule = make_schedule(config)
    lengths = lengths or [phase.rounds for phase in schedule]
    for index, phase in enumerate(schedule):
        before, adapter = number, phase.adapter_type
        down_codec = Codec.of_download(config.download, head)
        up_codec = Codec.of_upload(config.upload, adapter.is_selection, head)
        start, _, _ = adapter.base_layout(phase, config, backbone, before)
        start_bytes = BaseCodec.of(config.download).size(start)
        versions = VersionBytes(start_bytes, 4 * backbone.target_size)
        for phase_round in range(1, lengths[index] + 1):
            number += 1
            per_round = config.clients.per_round
            cohort = sample_cohort(clients, per_round, config.seed, number)
            down = up = 0
            for client in cohort:
                sent, back = adapter.traffic(
                    phase, config, backbone, phase_round, client
                )
                down += down_codec.size(sent) + versions.bytes_due(client)
                if config.secure.aggregation:
                    up += masked_bytes(config, adapter.section, back)
                else:
                    up += up_codec.size(back)
            rounds.append(PlannedRound(number, index, down, up))
            change = 0
            if phase.changes_base:
                change = adapter.change_size(phase, config, backbone, len(cohort))
            versions.changes.append(4 * change)
    return rounds


def population(config: RunConfig) -> list[int]:
    """Return the client ids; with one client per node, as many as in a cohort."""
    return list(range(config.clients.count or config.clients.per_round))
