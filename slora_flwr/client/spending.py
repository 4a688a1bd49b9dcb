"""What a node's clients have spent of their privacy in a run, and whether more may be.

It is in Flower's `Context`, which ends with the run and never leaves the node.
"""

from collections.abc import Callable, Iterable
from typing import cast

from flwr.app import ConfigRecord, Context

from slora_flwr.privacy.accountant import Release
from slora_flwr.privacy.examples import ExamplePrivacy
from slora_flwr.training.trainer import Trainer

_SPENT = "spent"


def spend(
    context: Context,
    trainer: Trainer,
    client: int,
    phase: int,
    count: Callable[[Release], None],
) -> float:
    """Count a client's training before it begins; return its noise multiplier.

    A training counts even if it fails or nobody takes its result.

    Parameters
    ----------
    context : Context
        The node's context.
    trainer : Trainer
        The node's trainer.
    client : int
        The client's id.
    phase : int
        The phase's index in the schedule.
    count : Callable
        Called with the training's release, which it may refuse.

    Raises
    ------
    BudgetError
        If it may not train once more.
    """
    examples, _ = trainer.data.examples(client)
    privacy = ExamplePrivacy(trainer.config, len(examples))
    after = privacy.spend(spent(context, client), phase)
    count(privacy.release(phase))
    kept = dict(context.state.config_records.get(_SPENT, {}))
    kept[str(client)] = _flat(after)
    context.state[_SPENT] = ConfigRecord(kept)
    return privacy.noise_multiplier


def spent(context: Context, client: int) -> list[Release]:
    """Return the releases of a client's gradients so far."""
    kept = dict(context.state.config_records.get(_SPENT, {}))
    flat = iter(cast(list[float], kept.get(str(client), [])))
    triples = zip(flat, flat, flat, strict=True)
    return [Release(rate, noise, int(steps)) for rate, noise, steps in triples]


def _flat(releases: Iterable[Release]) -> list[float]:
    return [x for r in releases for x in (r.rate, r.noise_multiplier, float(r.steps))]
