"""The summary of a run, and what its config resolved to."""

from collections.abc import Mapping
from typing import Any

from slora_flwr.backbone.load import Backbone
from slora_flwr.config import RunConfig
from slora_flwr.config.methods import REFERENCES, find_adapter, list_methods
from slora_flwr.reports.chance import tell_chance
from slora_flwr.runs.directory import RunDirectory
from slora_flwr.runs.ledger import Ledger
from slora_flwr.server.strategy import PhasedStrategy
from slora_flwr.training.precision import precision_on
from slora_flwr.training.trainer import Trainer


def resolve(trainer: Trainer, moved: int) -> dict[str, Any]:
    """Return what a run's config resolved to, for resolved.toml.

    Parameters
    ----------
    trainer : Trainer
        The server's trainer.
    moved : int
        Number of examples that were moved so that no client is empty.
    """
    backbone, data = trainer.model.backbone, trainer.data
    return {
        "backbone_digest": backbone.digest,
        "precision": precision_on(trainer.config, backbone.device),
        "weights": backbone.size,
        "target_matrices": len(backbone.targets),
        "classes": data.classes,
        "train_examples": len(data.tokenised.train),
        "test_examples": len(data.tokenised.test),
        "moved_examples": moved,
        "phases": [
            {
                "adapter": p.adapter,
                "rounds": p.rounds,
                "lr": p.recipe.lr,
                "head_lr": p.recipe.head_lr,
            }
            for p in trainer.schedule
        ],
    }


def summarise(
    trainer: Trainer,
    strategy: PhasedStrategy,
    directory: RunDirectory,
    seconds: float,
) -> dict[str, Any]:
    """Return the content of summary.json.

    Parameters
    ----------
    trainer : Trainer
        The server's trainer.
    strategy : PhasedStrategy
        The strategy after the last round.
    directory : RunDirectory
        The run directory.
    seconds : float
        Seconds that the run took.
    """
    config, history = trainer.config, strategy.journal.history
    ledger = directory.ledger
    phases: dict[str, Any] = {}
    before, first = 0.0, 0
    for phase, length in zip(trainer.schedule, strategy.lengths, strict=True):
        last = history[first + length - 1]
        phases[phase.adapter] = {
            "rounds": length,
            "seconds": last.seconds - before,
            # None if no client could evaluate and the server has no test data.
            **_figures(trainer, last.metrics),
            **_bytes(ledger, phase.adapter),
        }
        before, first = last.seconds, first + length
    turns = sum(done.replied for done in history)
    summary = {
        "directory": str(directory.path),
        "method": config.method,
        "rounds": config.rounds,
        **_figures(trainer, last.metrics, *trainer.task.references),
        "best": strategy.journal.best,
        **_bytes(ledger),
        "seconds": seconds,
        "phases": phases,
        # What clients would send with other methods in these rounds, one direction.
        "same_rounds": {
            method: turns * 4 * _largest_state(method, config, trainer.model.backbone)
            for method in REFERENCES
        },
    }
    if warning := tell_chance(config, summary):
        summary["warning"] = warning
    target = config.run.target
    reached = [h for h in history if trainer.task.reaches(h.metrics, target)]
    if target and reached:
        keys = ("round", "payload_bytes", "seconds")
        summary["target"] = {name: getattr(reached[0], name) for name in keys}
    return summary


def _figures(
    trainer: Trainer, metrics: Mapping[str, float], *others: str
) -> dict[str, float | None]:
    task = trainer.task
    asked = [name for name in task.extras if name in metrics]
    return {name: metrics.get(name) for name in (*task.metrics, *others, *asked)}


def _bytes(ledger: Ledger, phase: str | None = None) -> dict[str, int]:
    return {
        f"{unit}_bytes_{direction}": ledger.total(unit, direction, phase)
        for unit in ("payload", "message")
        for direction in ("up", "down")
    }


def _largest_state(method: str, config: RunConfig, backbone: Backbone) -> int:
    """Return the number of values in the largest state of a method's phases."""
    adapters = [find_adapter(row.adapter) for row in list_methods()[method].phases]
    return max(adapter.state_size(config, backbone) for adapter in adapters)
