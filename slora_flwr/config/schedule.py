"""Methods as schedules of phases."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from slora_flwr.config.sections import PhaseRecipeConfig, RecipeConfig, RunConfig

# Each method: the adapters of its phases, in order.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "fft": ("full",),
    "head": ("head",),
    "sft": ("sparse",),
    "lora": ("lora",),
    "ffa-lora": ("lora",),
    "alternate-lora": ("lora",),
    "fedex-lora": ("lora",),
    "flexlora": ("lora",),
    "slora": ("sparse", "lora"),
    "head-lora": ("head", "lora"),
    "bitfit": ("bias",),
    "houlsby": ("houlsby",),
    "pfeiffer": ("pfeiffer",),
}

# The useful rates differ by an order of magnitude between adapters.
DEFAULT_RATES = {
    "full": 5e-4,
    "head": 5e-3,
    "sparse": 1e-2,
    "lora": 2e-3,
    "bias": 5e-3,
    "houlsby": 2e-3,
    "pfeiffer": 2e-3,
}


@dataclass(frozen=True)
class Phase:
    """An adapter, a number of rounds, a local training recipe, an aggregator.

    Attributes
    ----------
    adapter : str
        One of `DEFAULT_RATES`; it also names the phase.
    rounds : int
        Number of rounds; the most that it may take where `is_open`.
    recipe : RecipeConfig
        Local training, every field resolved.
    aggregator : str
        What becomes of the clients' updates: `fedavg`, or another of the low-rank
        phase's.
    primed : bool
        True where it starts from the delta that a sparse phase before it learned.
    is_open : bool
        True where the phase ends once it has stopped gaining.
    moves_base : bool
        True where each round changes the weights that the adapter stands on.
    """

    adapter: str
    rounds: int
    recipe: RecipeConfig
    aggregator: str = "fedavg"
    primed: bool = False
    is_open: bool = False
    moves_base: bool = False


def make_schedule(config: RunConfig) -> list[Phase]:
    """List the phases of the run's method in order."""
    adapters = SCHEDULES[config.method]
    phases = []
    for i, adapter in enumerate(adapters):
        rounds, is_open = config.rounds, False
        if len(adapters) == 2:
            is_open = i == 0 and not config.sparse.rounds
            first = config.sparse.rounds or config.rounds // 2
            rounds = first if i == 0 else config.rounds - first
        aggregator = config.aggregator if adapter == "lora" else "fedavg"
        redrawn = adapter == "sparse" and config.sparse.schedule == "per-round"
        phases.append(
            Phase(
                adapter,
                rounds,
                _recipe(config, adapter),
                aggregator,
                primed=adapters[:i] == ("sparse",),
                is_open=is_open,
                moves_base=redrawn or aggregator == "exact",
            )
        )
    return phases


# An open phase ends when neither figure has gained in so many rounds, by so much.
PATIENCE, LEAST_GAIN = 3, 0.01


def has_stopped_gaining(*figures: Sequence[float]) -> bool:
    """Tell whether an open phase should end: each figure's best is `PATIENCE` old.

    A figure (accuracy; share of the delta's energy that the rank keeps) gains in a
    round if it exceeds the best before by `LEAST_GAIN`, absolute: one point.

    Parameters
    ----------
    *figures : Sequence[float]
        Each figure after every round so far, in order; all of one length.
    """
    return all(_rounds_without_gain(series) >= PATIENCE for series in figures)


def _rounds_without_gain(series: Sequence[float]) -> int:
    best, since = -math.inf, 0
    for value in series:
        since = 0 if value > best + LEAST_GAIN else since + 1
        best = value if since == 0 else best
    return since


def _recipe(config: RunConfig, adapter: str) -> RecipeConfig:
    own: PhaseRecipeConfig = {
        "sparse": config.sparse,
        "lora": config.lora,
        "houlsby": config.bottleneck,
        "pfeiffer": config.bottleneck,
    }.get(adapter, PhaseRecipeConfig())
    return replace(
        config.train,
        epochs=own.epochs or config.train.epochs,
        batch_size=own.batch_size or config.train.batch_size,
        optimizer=own.optimizer or config.train.optimizer,
        lr=own.lr or config.train.lr or DEFAULT_RATES[adapter],
    )
