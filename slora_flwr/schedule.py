"""Methods as schedules of phases."""

from dataclasses import dataclass, replace

from slora_flwr.config import PhaseRecipeConfig, RecipeConfig, RunConfig

# Each method: the adapters of its phases, in order.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "fft": ("full",),
    "head": ("head",),
    "sft": ("sparse",),
    "lora": ("lora",),
    "slora": ("sparse", "lora"),
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
    """An adapter, a number of rounds, a local training recipe.

    Attributes
    ----------
    adapter : str
        One of `DEFAULT_RATES`; it also names the phase.
    rounds : int
        Number of rounds.
    recipe : RecipeConfig
        Local training, every field resolved.
    primed : bool
        True where the phase starts from the delta that the phase before it learned.
    """

    adapter: str
    rounds: int
    recipe: RecipeConfig
    primed: bool = False


def make_schedule(config: RunConfig) -> list[Phase]:
    """List the phases of the run's method in order."""
    adapters = SCHEDULES[config.method]
    phases = []
    for i, adapter in enumerate(adapters):
        rounds = config.rounds
        if len(adapters) == 2:
            first = config.sparse.rounds
            rounds = first if i == 0 else config.rounds - first
        recipe = _recipe(config, adapter)
        phases.append(Phase(adapter, rounds, recipe, primed=i > 0))
    return phases


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
