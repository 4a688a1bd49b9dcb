"""A whole run on a grid: from the config to the run directory."""

import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from importlib.metadata import version
from logging import INFO
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from rich.console import Console

from slora_flwr import __version__
from slora_flwr.adapters.model_files import export_classes
from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.backbone.load import Backbone, digest_of
from slora_flwr.common.code_digest import code_digest
from slora_flwr.common.files import make_folder, make_private, residuals_folder
from slora_flwr.config import ConfigError, RunConfig, Value, parse
from slora_flwr.config.methods import REFERENCES, find_adapter, list_methods
from slora_flwr.config.schedule import outside_files
from slora_flwr.reports.closing_table import closing_table
from slora_flwr.runs.checkpoint import EVENTS, check_identity, find_checkpoint
from slora_flwr.runs.directory import RunDirectory, RunDirectoryError, in_use, writing
from slora_flwr.runs.snapshot import Snapshot
from slora_flwr.server.fleet import Fleet
from slora_flwr.server.own_data_fleet import OwnDataFleet
from slora_flwr.server.privacy import Privacy
from slora_flwr.server.strategy import PhasedStrategy
from slora_flwr.training.trainer import Trainer
from slora_flwr.wire.packing import pack


def run(
    grid: Grid,
    run_config: Mapping[str, Value],
    run_id: int,
    generator: np.random.Generator | None = None,
) -> dict[str, Any]:
    """Run a method as its config says.

    Parameters
    ----------
    grid : Grid
        Flower's, or the in-process one.
    run_config : Mapping[str, Value]
        Flat keys, as Flower hands them over.
    run_id : int
        Names the run directory.
    generator : numpy.random.Generator or None
        For privacy, see `slora_flwr.server.privacy`; None but in tests.

    Returns
    -------
    dict
        What summary.json holds.

    Raises
    ------
    ConfigError
        Before any client is asked, if the config cannot be run, or the directory of
        the run that is to go on is in use.
    FleetError
        If no node can train.
    RunDirectoryError
        If the run directory cannot be written any more.
    """
    config = parse(run_config)
    checkpoint = None
    with ExitStack() as held:
        if config.run.resume:
            path = Path(config.run.resume).expanduser()
            try:
                has_begun = (path / EVENTS).is_file()
            except OSError as error:
                raise ConfigError(
                    f"run.resume is {config.run.resume!r}; allowed: a run directory "
                    f"that can be read ({error})"
                ) from error
            if has_begun:  # else there is nothing to go on with
                held.enter_context(in_use(path))
            checkpoint = find_checkpoint(config)
        return _run(grid, config, run_id, generator, checkpoint, held)


def _run(
    grid: Grid,
    config: RunConfig,
    run_id: int,
    generator: np.random.Generator | None,
    checkpoint: Snapshot | None,
    held: ExitStack,
) -> dict[str, Any]:
    """Run, from the checkpoint on if there is one; `held` keeps what ends with it."""
    started = time.perf_counter()
    privacy = Privacy(config, generator) if config.privacy.is_on else None
    trainer = Trainer(config)
    moved = 0
    if config.clients.count:
        # Here too, so that an impossible partition ends the run before any message.
        moved = trainer.data.partition.moved
    fleet_of = _own_data_fleet if config.data.is_own else _shared_data_fleet
    code = code_digest(outside_files(config))
    fleet = fleet_of(trainer, {"version": __version__, "code": code})
    if checkpoint is not None:
        check_identity(config, checkpoint, fleet.expected)
        fleet.restore(checkpoint.facts["agreed"])
    directory = RunDirectory(config, run_id, checkpoint)
    if checkpoint is None:
        held.enter_context(in_use(directory.path))
    started -= directory.elapsed
    log(INFO, "slora-flwr %s, run directory %s", version("slora-flwr"), directory.path)
    if moved:
        log(INFO, "%d examples were moved so that no client is empty", moved)
    if checkpoint is None:
        directory.write_config(config, {})
    else:
        number = checkpoint.facts["round"]
        directory.event("resumed", round=number, run=str(run_id))
        log(INFO, "the run goes on after round %d of %d", number, config.rounds)
    try:
        fleet.gather(grid, directory.event)
        if isinstance(fleet, OwnDataFleet):
            trainer = Trainer(config, fleet.classes)
        resolved = _resolved(trainer, moved)
        if privacy is not None:
            resolved["privacy"] = privacy.facts(config.rounds)
        if checkpoint is None:
            directory.write_config(config, resolved)
        strategy = PhasedStrategy(trainer, directory, fleet, checkpoint, privacy)
        strategy.start(
            grid,
            ArrayRecord({"state": pack(strategy.initial_state())}),
            timeout=config.clients.deadline,
        )
    except Exception as error:
        with suppress(RunDirectoryError):  # which may be what the error is about
            directory.event("stopped", reason=f"{type(error).__name__}: {error}")
        raise
    summary = _summarise(config, trainer, strategy, directory, started)
    if privacy is not None:
        summary["privacy"] = privacy.facts(config.rounds)
    directory.write_summary(summary)
    with writing(directory.path):
        _export(trainer, strategy, directory)
    # Those of a simulation's clients, who are done.
    shutil.rmtree(residuals_folder(directory.lineage), ignore_errors=True)
    Console(width=100).print(closing_table(summary))
    log(INFO, "run directory %s", directory.path)
    return summary


def _shared_data_fleet(trainer: Trainer, expected: dict[str, object]) -> Fleet:
    expected |= {
        "backbone": trainer.model.backbone.digest,
        "classes": trainer.data.classes,
    }
    clients = trainer.config.clients
    sizes = None
    if clients.count:
        expected["partition"] = trainer.data.partition_digest
        sizes = dict(enumerate(trainer.data.partition.sizes.tolist()))
    return Fleet(expected, clients.min_nodes, clients.deadline, sizes)


def _own_data_fleet(trainer: Trainer, expected: dict[str, object]) -> Fleet:
    config = trainer.config
    expected["backbone"] = digest_of(config.model)
    labels = {name.strip() for name in config.data.labels.split(",")} - {""}
    # Before the nodes' are known, the classes are those of the server's test data.
    if labels and (others := {*trainer.data.classes} - labels):
        raise ConfigError(
            f"data.test is {config.data.test!r}, which holds the labels "
            f"{', '.join(sorted(others))}; allowed: those of data.labels, which are "
            f"{', '.join(sorted(labels))}"
        )
    return OwnDataFleet(
        expected,
        config.clients.min_nodes,
        config.clients.deadline,
        labels=labels,
        also=trainer.data.classes,
        min_examples=config.clients.min_examples,
    )


def _resolved(trainer: Trainer, moved: int) -> dict[str, Any]:
    backbone, task = trainer.model.backbone, trainer.data.task
    return {
        "backbone_digest": backbone.digest,
        "weights": backbone.size,
        "target_matrices": len(backbone.targets),
        "classes": task.classes,
        "train_examples": len(task.train),
        "test_examples": len(task.test),
        "moved_examples": moved,
        "phases": [
            {"adapter": p.adapter, "rounds": p.rounds, "lr": p.recipe.lr}
            for p in trainer.schedule
        ],
    }


def _summarise(
    config: RunConfig,
    trainer: Trainer,
    strategy: PhasedStrategy,
    directory: RunDirectory,
    started: float,
) -> dict[str, Any]:
    ledger = directory.ledger
    figures = ("accuracy", "macro_f1", "loss")
    turns = sum(int(round["replied"]) for round in strategy.history)

    def sums(phase: str | None = None) -> dict[str, int]:
        return {
            f"{unit}_bytes_{direction}": ledger.total(unit, direction, phase)
            for unit in ("payload", "message")
            for direction in ("up", "down")
        }

    phases: dict[str, Any] = {}
    before = 0.0
    for i, phase in enumerate(trainer.schedule):
        rounds = [figures for figures in strategy.history if figures["phase"] == i]
        last = rounds[-1]
        phases[phase.adapter] = {
            "rounds": len(rounds),
            "seconds": last["seconds"] - before,
            # None where no client could evaluate, and the server has no test data.
            **{name: last.get(name) for name in figures},
            **sums(phase.adapter),
        }
        before = last["seconds"]
    summary = {
        "method": config.method,
        "rounds": config.rounds,
        **{name: last.get(name) for name in (*figures, "majority_accuracy")},
        **sums(),
        "seconds": time.perf_counter() - started,
        "phases": phases,
        # One direction of what the other methods' clients would send in these rounds.
        "same_rounds": {
            method: turns * 4 * _largest_state(method, config, trainer.model.backbone)
            for method in REFERENCES
        },
    }
    reached = [h for h in strategy.history if h.get("accuracy", 0) >= config.run.target]
    if config.run.target and reached:
        keys = ("round", "payload_bytes", "seconds")
        summary["target"] = {name: reached[0][name] for name in keys}
    return summary


def _largest_state(method: str, config: RunConfig, backbone: Backbone) -> int:
    """Return the number of values in the largest state of a method's phases."""
    adapters = [find_adapter(row.adapter) for row in list_methods()[method].phases]
    return max(adapter.state_size(config, backbone) for adapter in adapters)


def _export(
    trainer: Trainer, strategy: PhasedStrategy, directory: RunDirectory
) -> None:
    model, base = trainer.model, strategy.patch
    folder = directory.path / model.adapter.folder
    make_folder(folder)
    if trainer.schedule[-1].changes_base:
        base = BaseWeights(weights=model.base_weights())
    classes = trainer.data.classes
    model.adapter.export(folder, strategy.state, base, classes, model.detach)
    export_classes(folder, classes)
    make_private(folder)
