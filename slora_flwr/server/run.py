"""A whole run on a grid: from the config to the run directory."""

import time
from collections.abc import Mapping
from importlib.metadata import version
from logging import INFO
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from rich.console import Console

from slora_flwr.adapters.export import export_adapter, export_classes, export_model
from slora_flwr.adapters.size import state_size
from slora_flwr.config import RunConfig, Value, parse
from slora_flwr.reports.table import closing_table
from slora_flwr.server.run_directory import RunDirectory
from slora_flwr.server.strategy import PhasedStrategy
from slora_flwr.training.worker import Worker
from slora_flwr.wire.packing import pack


def run(grid: Grid, run_config: Mapping[str, Value], run_id: int) -> dict[str, Any]:
    """Run a method as its config says.

    Parameters
    ----------
    grid : Grid
        Flower's, or the in-process one.
    run_config : Mapping[str, Value]
        Flat keys, as Flower hands them over.
    run_id : int
        Names the run directory.

    Returns
    -------
    dict
        What summary.json holds.

    Raises
    ------
    ConfigError
        Before any client is asked, if the config cannot be run.
    """
    config = parse(run_config)
    started = time.perf_counter()
    worker = Worker(config)
    backbone, task = worker.backbone, worker.task
    moved = 0
    if config.clients.count:
        # Here too, so that an impossible partition ends the run before any message.
        moved = worker.partition.moved
    directory = RunDirectory(config, run_id)
    log(INFO, "slora-flwr %s, run directory %s", version("slora-flwr"), directory.path)
    if moved:
        log(INFO, "%d examples were moved so that no client is empty", moved)
    directory.write_config(
        config,
        {
            "backbone_digest": backbone.digest,
            "weights": backbone.size,
            "target_matrices": len(backbone.targets),
            "classes": task.classes,
            "train_examples": len(task.train),
            "test_examples": len(task.test),
            "moved_examples": moved,
            "phases": [
                {"adapter": p.adapter, "rounds": p.rounds, "lr": p.recipe.lr}
                for p in worker.schedule
            ],
        },
    )
    strategy = PhasedStrategy(worker, directory)
    try:
        strategy.start(
            grid,
            ArrayRecord({"state": pack(strategy.initial_state())}),
            timeout=config.clients.deadline,
        )
    except Exception as error:
        directory.event("stopped", reason=f"{type(error).__name__}: {error}")
        raise
    summary = _summarise(config, worker, strategy, directory, started)
    directory.write_summary(summary)
    _export(config, worker, strategy, directory)
    Console(width=100).print(closing_table(summary))
    log(INFO, "run directory %s", directory.path)
    return summary


def _summarise(
    config: RunConfig,
    worker: Worker,
    strategy: PhasedStrategy,
    directory: RunDirectory,
    started: float,
) -> dict[str, Any]:
    test, ledger = worker.task.test.labels, directory.ledger
    figures = ("accuracy", "macro_f1", "loss")
    turns = sum(int(round["replied"]) for round in strategy.history)

    def sums(phase: str | None = None) -> dict[str, int]:
        return {
            f"{unit}_bytes_{direction}": ledger.total(unit, direction, phase)
            for unit in ("payload", "message")
            for direction in ("up", "down")
        }

    phases: dict[str, Any] = {}
    done, before = 0, 0.0
    for phase in worker.schedule:
        done += phase.rounds
        last = strategy.history[done - 1]
        phases[phase.adapter] = {
            "rounds": phase.rounds,
            "seconds": last["seconds"] - before,
            **{name: last[name] for name in figures},
            **sums(phase.adapter),
        }
        before = last["seconds"]
    summary = {
        "method": config.method,
        "rounds": config.rounds,
        **{name: strategy.history[-1][name] for name in figures},
        "majority_accuracy": float(np.bincount(test).max() / len(test)),
        **sums(),
        "seconds": time.perf_counter() - started,
        "phases": phases,
        # One direction of what the other methods' clients would send in these rounds.
        "same_rounds": {
            method: turns * 4 * state_size(adapter, config, worker.backbone)
            for method, adapter in (("fft", "full"), ("lora", "lora"))
        },
    }
    reached = [h for h in strategy.history if h.get("accuracy", 0) >= config.run.target]
    if config.run.target and reached:
        keys = ("round", "payload_bytes", "seconds")
        summary["target"] = {name: reached[0][name] for name in keys}
    return summary


def _export(
    config: RunConfig, worker: Worker, strategy: PhasedStrategy, directory: RunDirectory
) -> None:
    last = worker.schedule[-1].adapter
    if last == "lora":
        worker.leave()
        folder = directory.path / "adapter"
        export_adapter(
            folder,
            worker.backbone,
            strategy.state,
            config.lora.rank,
            config.lora.alpha,
            strategy.patch,
        )
    else:
        # PEFT has no format for these, so the whole model is written.
        assert worker.adapter is not None
        worker.adapter.load(strategy.state)
        folder = directory.path / "model"
        export_model(folder, worker.backbone, worker.task.classes)
    export_classes(folder, worker.task.classes)
