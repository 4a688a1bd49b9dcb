"""LoRA as a phase of a run: its sizes, its starts, what it leaves."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from slora_flwr.adapters.base import require_targets
from slora_flwr.adapters.export import export_adapter
from slora_flwr.adapters.handoff import (
    Handoff,
    base_layout,
    prime_low_rank,
    start_from_weights,
)
from slora_flwr.adapters.low_rank import LowRankAdapter
from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.backbone.load import Backbone
from slora_flwr.common.tensors import State
from slora_flwr.config import ConfigError, LoraConfig, RunConfig
from slora_flwr.config.methods import find_aggregator
from slora_flwr.config.schedule import Phase


class LoraAdapter(LowRankAdapter):
    """Low-rank factors, as the run config describes them."""

    default_lr = 2e-3
    section = "lora"
    takes_delta = True
    folder = "adapter"

    @classmethod
    def from_config(cls, config: RunConfig, frozen: State | None = None) -> Self:
        """Return an adapter of the run, not attached yet."""
        return cls(
            config.lora.rank,
            config.lora.alpha,
            scaling=config.lora.scaling,
            seed=config.seed,
            trains=find_aggregator(config.aggregator).trains,
            orthonormal=config.lora.start == "orthonormal",
            frozen=frozen,
        )

    @classmethod
    def check_fit(cls, config: RunConfig, backbone: Backbone) -> None:
        """Refuse a backbone without target matrices, or with smaller ones than rank."""
        require_targets(config, backbone)
        side, name = min((min(m.weight.shape), n) for n, m in backbone.targets.items())
        if config.lora.rank > side:
            raise ConfigError(
                f"lora.rank is {config.lora.rank}; allowed: 1 to {side}, the smaller "
                f"side of {name}"
            )

    @classmethod
    def state_size(cls, config: RunConfig, backbone: Backbone) -> int:
        """Return the number of values of the head, A and B, whatever is attached."""
        return backbone.head_size + factors_size(config.lora.rank, backbone)

    @classmethod
    def traffic(
        cls,
        phase: Phase,
        config: RunConfig,
        backbone: Backbone,
        phase_round: int,
        client: int,
    ) -> tuple[int, int]:
        """Return how many values a client is sent in a round and how many it returns.

        A frozen A is not sent; of factors that are trained in turn one is returned.
        """
        rank, head = config.lora.rank_of(client), backbone.head_size
        modules = backbone.targets.values()
        a = rank * sum(module.in_features for module in modules)
        b = rank * sum(module.out_features for module in modules)
        match phase.aggregator_type.trains:
            case "b":
                return b + head, b + head
            case "in-turn":
                return a + b + head, head + (b if phase_round % 2 else a)
        return a + b + head, a + b + head

    @classmethod
    def base_layout(
        cls, phase: Phase, config: RunConfig, backbone: Backbone, rounds_before: int
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, NDArray[np.int64]], float]:
        """Return what the base that the phase starts from is made of."""
        return base_layout(phase, config, backbone, rounds_before)

    @classmethod
    def change_size(
        cls, phase: Phase, config: RunConfig, backbone: Backbone, cohort: int
    ) -> int:
        """Return the most values of factors whose product a round adds to the base."""
        # The mean of the products lacks the products of the clients' deviations from
        # the means, and one client's deviations follow from the others'.
        sides = [min(m.weight.shape) for m in backbone.targets.values()]
        rank = min(max(0, cohort - 1) * config.lora.rank, max(sides))
        return factors_size(rank, backbone)

    @classmethod
    def start(
        cls, phase: Phase, config: RunConfig, backbone: Backbone
    ) -> tuple[State, BaseWeights | None]:
        """Return where a phase starts that nothing primes."""
        trains = phase.aggregator_type.trains
        if config.lora.start == "federa":
            return start_from_weights(backbone, _lora_config(config))
        if config.lora.start == "orthonormal" and trains == "b":
            # It travels, since the last bits of a QR depend on the machine.
            lora = cls.from_config(config)
            lora.attach(backbone)
            whole = lora.whole({})
            lora.detach()
            a = {name: whole[f"{name}.lora_A"] for name in backbone.targets}
            return {}, BaseWeights(a=a)
        return {}, None

    @classmethod
    def prime(
        cls,
        config: RunConfig,
        backbone: Backbone,
        positions: Mapping[str, NDArray[np.int64]],
        values: State,
        head: State,
    ) -> Handoff:
        """Return where a phase starts that is primed; see `prime_low_rank`."""
        lora, seed = _lora_config(config), config.seed
        return prime_low_rank(backbone, dict(positions), values, head, lora, seed)

    @classmethod
    def client_ranks(cls, config: RunConfig) -> Callable[[int], int] | None:
        """Return each client's rank by its id, None where all have the same."""
        return config.lora.rank_of if config.lora.ranks else None

    def export(
        self,
        folder: Path,
        state: State,
        base: BaseWeights | None,
        classes: list[str],
        leave: Callable[[], None],
    ) -> None:
        """Write a final state in PEFT's format, with a patch of the base if needed."""
        backbone, state = self.backbone, self.whole(state)
        leave()
        export_adapter(folder, backbone, state, self.rank, self.scaling, base)


def factors_size(rank: int, backbone: Backbone) -> int:
    """Return the number of values of all target matrices' A and B of a rank."""
    modules = backbone.targets.values()
    return rank * sum(module.out_features + module.in_features for module in modules)


def _lora_config(config: RunConfig) -> LoraConfig:
    """Return the section with the aggregator that the method names."""
    return replace(config.lora, aggregator=config.aggregator)
