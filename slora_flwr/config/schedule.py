"""A run's method as a schedule of phases."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slora_flwr.config.errors import ConfigError
from slora_flwr.config.methods import (
    find_adapter,
    find_aggregator,
    find_outside_files,
    list_methods,
)
from slora_flwr.config.sections import PhaseRecipeConfig, RecipeConfig, RunConfig


@dataclass(frozen=True)
class Phase:
    """An adapter, a number of rounds, a local training recipe, an aggregator.

    Attributes
    ----------
    adapter : str
        The adapter's name, which also names the phase.
    rounds : int
        Number of rounds; the maximum if `is_open`.
    recipe : RecipeConfig
        Local training, every field resolved.
    aggregator : str
        The aggregator's name.
    primed : bool
        True if it starts from the delta that the phase before it learned.
    is_open : bool
        True if the phase ends once it has stopped gaining.
    changes_base : bool
        True if each round changes the weights under the adapter.
    average : str
        The rule of the average of states, see `server.average`.
    renews : bool
        True if one round's values do not apply to the next, so residuals of their
        coding are dropped.
    """

    adapter: str
    rounds: int
    recipe: RecipeConfig
    aggregator: str = "fedavg"
    primed: bool = False
    is_open: bool = False
    changes_base: bool = False
    average: str = "none"
    renews: bool = False

    def at(self, phase_round: int) -> "Phase":
        """Return the phase with a round's learning rates, counted from 1."""
        recipe = self.recipe
        share = rate_share(recipe, phase_round, self.rounds)
        lr, head_lr = share * recipe.lr, share * recipe.head_lr
        return replace(self, recipe=replace(recipe, lr=lr, head_lr=head_lr))

    @property
    def adapter_type(self) -> Any:
        """The adapter's class, a `slora_flwr.adapters.base.Adapter`."""
        return find_adapter(self.adapter)

    @property
    def aggregator_type(self) -> Any:
        """The aggregator's class, a `slora_flwr.aggregation.base.Aggregator`."""
        return find_aggregator(self.aggregator)


def make_schedule(config: RunConfig) -> list[Phase]:
    """Return the phases of the run's method in order."""
    rows = list_methods()[config.method].phases
    phases = []
    for i, row in enumerate(rows):
        rounds, is_open = config.rounds, False
        if len(rows) == 2:
            is_open = i == 0 and not config.sparse.rounds
            first = config.sparse.rounds or config.rounds // 2
            rounds = first if i == 0 else config.rounds - first
        name = row.aggregator or config.lora.aggregator
        adapter, aggregator = find_adapter(row.adapter), find_aggregator(name)
        changes = adapter.changes_base(config) or aggregator.changes_base
        primed = i > 0 and find_adapter(rows[i - 1].adapter).learns_delta
        if primed and not adapter.takes_delta:
            raise ConfigError(
                f"method is {config.method!r}, whose phase {row.adapter} cannot start "
                f"from what {rows[i - 1].adapter} learned; allowed: an adapter that "
                "takes a delta, such as lora"
            )
        phases.append(
            Phase(
                row.adapter,
                rounds,
                _recipe(config, adapter),
                name,
                primed=primed,
                is_open=is_open,
                changes_base=changes,
                average=_average(config, changes),
                renews=adapter.changes_base(config) or aggregator.renews,
            )
        )
    return phases


def rate_share(recipe: RecipeConfig, phase_round: int, rounds: int) -> float:
    """Return a round's share of the learning rate.

    It grows linearly over the warm-up and is 1 in its last round and in the round after
    it. Then it decays as `train.schedule` says, and would be 0 in the round after the
    phase's last.

    Parameters
    ----------
    recipe : RecipeConfig
        Local training.
    phase_round : int
        The round within the phase, from 1.
    rounds : int
        Number of rounds of the phase.
    """
    warm = recipe.warmup_rounds
    if phase_round <= warm:
        return phase_round / warm
    done = (phase_round - 1 - warm) / (rounds - warm)
    match recipe.schedule:
        case "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        case "linear":
            return 1 - done
    return 1.0


def outside_files(config: RunConfig) -> tuple[Path, ...]:
    """Return the source files of the outside packages that a run's method uses."""
    schedule = make_schedule(config)
    return find_outside_files(
        methods=[config.method],
        adapters=[phase.adapter for phase in schedule],
        aggregators=[phase.aggregator for phase in schedule],
    )


# An open phase ends after this many rounds in which no figure gains this much.
PATIENCE, LEAST_GAIN = 3, 0.01


def has_stopped_gaining(*figures: Sequence[float]) -> bool:
    """Return whether no figure of an open phase has gained for `PATIENCE` rounds.

    A figure (the task's score; share of the delta's energy that the rank keeps) gains
    in a round if it exceeds its best so far by `LEAST_GAIN`, absolute: one point of
    accuracy, or about one percent of perplexity.

    Parameters
    ----------
    *figures : Sequence[float]
        Each figure after every round so far, in order; all have the same length.
    """
    return all(_rounds_without_gain(series) >= PATIENCE for series in figures)


def _rounds_without_gain(series: Sequence[float]) -> int:
    best, since = -math.inf, 0
    for value in series:
        since = 0 if value > best + LEAST_GAIN else since + 1
        best = value if since == 0 else best
    return since


def _average(config: RunConfig, changes_base: bool) -> str:
    """Return the rule of a phase's average; see `server.average`."""
    rule = config.server.average
    if rule != "auto":
        return rule
    # All of an averaged base would have to be sent to the clients that evaluate.
    return "none" if changes_base and config.clients.holdout else "ema"


def _recipe(config: RunConfig, adapter: Any) -> RecipeConfig:
    own = getattr(config, adapter.section) if adapter.section else PhaseRecipeConfig()
    lr = own.lr or config.train.lr or adapter.default_lr
    head_lr = own.head_lr or config.train.head_lr or lr
    return replace(
        config.train,
        epochs=own.epochs or config.train.epochs,
        batch_size=own.batch_size or config.train.batch_size,
        optimizer=own.optimizer or config.train.optimizer,
        lr=head_lr if adapter.is_head else lr,
        head_lr=head_lr,
    )
