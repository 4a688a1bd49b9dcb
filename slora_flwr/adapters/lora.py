"""The adapter of low-rank phases: its sizes, traffic, start and export."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from torch import nn

from slora_flwr.adapters.base import require_targets
from slora_flwr.adapters.export import export_adapter, merge_adapter
from slora_flwr.adapters.handoff import (
    Handoff,
    base_layout,
    prime_low_rank,
    start_from_weights,
)
from slora_flwr.adapters.loading import WHOLE, Loading
from slora_flwr.adapters.low_rank import LowRankAdapter
from slora_flwr.adapters.model_files import export_model
from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.backbone.load import Backbone
from slora_flwr.common.tensors import State
from slora_flwr.config import ConfigError, RunConfig
from slora_flwr.config.schedule import Phase


class LoraAdapter(LowRankAdapter):
    """Train low-rank factors as the run config specifies."""

    default_lr = 2e-3
    section = "lora"
    takes_delta = True
    folder = "adapter"

    @classmethod
    def from_config(
        cls, config: RunConfig, trains: str = "both", frozen: State | None = None
    ) -> Self:
        """Return a detached adapter, built from a run config."""
        return cls(
            config.lora.rank,
            config.lora.alpha,
            scaling=config.lora.scaling,
            seed=config.seed,
            trains=trains,
            orthonormal=config.lora.start == "orthonormal",
            frozen=frozen,
        )

    @classmethod
    def check_fit(cls, config: RunConfig, backbone: Backbone) -> None:
        """Raise ConfigError if there are no target matrices, or the rank exceeds one.

        The rank may be at most the smaller side of each target matrix.
        """
        require_targets(config, backbone)
        side, name = min((_side(m), n) for n, m in backbone.targets.items())
        if config.lora.rank > side:
            raise ConfigError(
                f"lora.rank is {config.lora.rank}; allowed: 1 to {side}, the smaller "
                f"side of {name}"
            )

    @classmethod
    def state_size(cls, config: RunConfig, backbone: Backbone) -> int:
        """Return the number of values of the head, A and B."""
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
        """Return how many values a client receives and returns in a round.

        A frozen A is not sent. If the factors are trained in turn, one is returned.
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
        """Return the layout of the base that the phase starts from."""
        return base_layout(phase, config, backbone, rounds_before)

    @classmethod
    def change_size(
        cls, phase: Phase, config: RunConfig, backbone: Backbone, cohort: int
    ) -> int:
        """Return the largest size of the factors whose product changes the base."""
        # The product of the mean factors misses the products of the clients' deviations
        # from the means, and one client's deviations follow from the others'.
        sides = map(_side, backbone.targets.values())
        rank = min(max(0, cohort - 1) * config.lora.rank, max(sides))
        return factors_size(rank, backbone)

    @classmethod
    def start(
        cls, phase: Phase, config: RunConfig, backbone: Backbone
    ) -> tuple[State, BaseWeights | None]:
        """Return the start of a phase that is not primed by an earlier one."""
        trains = phase.aggregator_type.trains
        if config.lora.start == "federa":
            return start_from_weights(backbone, config.lora, trains)
        if config.lora.start == "orthonormal" and trains == "b":
            # A is sent, since the last bits of a QR depend on the machine.
            lora = cls.from_config(config, trains)
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
        trains: str,
        backbone: Backbone,
        positions: Mapping[str, NDArray[np.int64]],
        values: State,
        head: State,
    ) -> Handoff:
        """Return the start of a primed phase; see `prime_low_rank`."""
        return prime_low_rank(
            backbone, dict(positions), values, head, config.lora, trains, config.seed
        )

    @classmethod
    def primed_rank(cls, config: RunConfig) -> int:
        """Return the rank of the factors."""
        return config.lora.rank

    @classmethod
    def client_ranks(cls, config: RunConfig) -> Callable[[int], int] | None:
        """Return a function from client id to rank; None if all ranks are equal."""
        return config.lora.rank_of if config.lora.ranks else None

    def export(
        self,
        folder: Path,
        state: State,
        base: BaseWeights | None,
        classes: list[str],
        leave: Callable[[], None],
    ) -> Loading:
        """Write a final state in PEFT's format, with a base patch if needed."""
        backbone, state = self.backbone, self.whole(state)
        leave()
        return export_adapter(folder, backbone, state, self.rank, self.scaling, base)

    def merge(
        self,
        folder: Path,
        state: State,
        base: BaseWeights | None,
        classes: list[str],
        leave: Callable[[], None],
    ) -> Loading:
        """Write the whole model in float32, with the products in its weights."""
        backbone, state = self.backbone, self.whole(state)
        leave()
        merge_adapter(backbone, state, self.scaling, base)
        export_model(folder, backbone, classes)
        return WHOLE


def _side(module: nn.Linear) -> int:
    """Return the smaller side of a target matrix."""
    return min(module.out_features, module.in_features)


def factors_size(rank: int, backbone: Backbone) -> int:
    """Return the number of values in A and B of all target matrices."""
    modules = backbone.targets.values()
    return rank * sum(module.out_features + module.in_features for module in modules)
