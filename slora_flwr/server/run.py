"""A whole run on a grid: from the config to the run directory."""

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from logging import INFO, WARNING
from typing import Any

import numpy as np
from flwr.common.logger import log
from flwr.serverapp import Grid
from rich.console import Console

from slora_flwr.backbone.load import best_device, digest_of
from slora_flwr.common.files import run_folder
from slora_flwr.common.protocol import installed_version
from slora_flwr.common.text import counted
from slora_flwr.config import ConfigError, RunConfig, Value, parse
from slora_flwr.config.identity import code_identity
from slora_flwr.reports.chance import foresee
from slora_flwr.reports.closing_table import closing_table
from slora_flwr.reports.narrow_tables import print_table
from slora_flwr.reports.progress import CohortProgress
from slora_flwr.reports.samples_table import samples_table
from slora_flwr.runs.checkpoint import check_identity, find_checkpoint
from slora_flwr.runs.directory import RunDirectory, how_to_resume, in_use
from slora_flwr.runs.events import EVENTS, INTERRUPTED, Resumed, Stopped
from slora_flwr.runs.snapshot import Snapshot
from slora_flwr.runs.writing import RunDirectoryError
from slora_flwr.server.export import export
from slora_flwr.server.fleet import Fleet
from slora_flwr.server.guarantee import make_guarantee
from slora_flwr.server.own_data_fleet import OwnDataFleet
from slora_flwr.server.privacy import ExampleLedger
from slora_flwr.server.strategy import PhasedStrategy
from slora_flwr.server.summary import resolve, summarise
from slora_flwr.tasks.choice import find_task
from slora_flwr.tracking.following import Following
from slora_flwr.training.attached_model import AttachedModel
from slora_flwr.training.precision import precision_on
from slora_flwr.training.trainer import Trainer


def run(
    grid: Grid,
    run_config: Mapping[str, Value],
    run_id: int,
    generator: np.random.Generator | None = None,
    share: Callable[[AttachedModel], None] | None = None,
    engine: str = "flwr",
    progress: CohortProgress | None = None,
) -> dict[str, Any]:
    """Run a method as its config says.

    Parameters
    ----------
    grid : Grid
        Flower's grid, or the in-process one.
    run_config : Mapping[str, Value]
        Flat keys, as Flower passes them.
    run_id : int
        Names the run directory.
    generator : numpy.random.Generator or None
        Randomness for `slora_flwr.server.privacy`; None except in tests.
    share : Callable or None
        Gives the server's model to nodes that live in this process.
    engine : str
        What made the grid, as in `RecordedEngine`, for resolved.toml.
    progress : CohortProgress or None
        As in `PhasedStrategy`.

    Returns
    -------
    dict
        The content of summary.json.

    Raises
    ------
    ConfigError
        If the config cannot be run, or another run uses the directory to resume. No
        message has been sent by then.
    FleetError
        If no node can train.
    RunDirectoryError
        If the run directory can no longer be written.
    """
    config = parse(run_config)
    find_task(config).check(config)
    following = Following.of(config)
    with ExitStack() as held:
        checkpoint = _claim(config, held) if config.run.resume else None
        return _run(
            grid,
            config,
            run_id,
            generator,
            share,
            engine,
            progress,
            checkpoint,
            following,
            held,
        )


def _claim(config: RunConfig, held: ExitStack) -> Snapshot:
    """Return the checkpoint to resume from, and lock its directory."""
    path = config.run.resumed
    try:
        has_begun = (path / EVENTS).is_file()
    except OSError as error:
        raise ConfigError(
            f"run.resume is {config.run.resume!r}; allowed: a run directory that can "
            f"be read ({error})"
        ) from error
    if has_begun:  # Otherwise there is nothing to resume.
        held.enter_context(in_use(path))
    return find_checkpoint(config)


def _run(
    grid: Grid,
    config: RunConfig,
    run_id: int,
    generator: np.random.Generator | None,
    share: Callable[[AttachedModel], None] | None,
    engine: str,
    progress: CohortProgress | None,
    checkpoint: Snapshot | None,
    following: Following,
    held: ExitStack,
) -> dict[str, Any]:
    """Run from the start or a checkpoint; `held` keeps the directory's lock."""
    started = time.perf_counter()
    privacy = make_guarantee(config, generator)
    share = share or (lambda model: None)
    trainer = Trainer(config)
    share(trainer.model)
    trainer.data.check()  # so that what is impossible fails before any message
    _ = trainer.probes  # likewise
    moved = trainer.data.partition.moved if config.clients.count else 0
    fleet_of = _own_data_fleet if config.data.is_own else _shared_data_fleet
    fleet = fleet_of(trainer, {**code_identity(config)})
    if checkpoint is not None:
        check_identity(config, checkpoint, fleet.expected)
        fleet.restore(checkpoint.facts["agreed"])
    directory = RunDirectory(config, run_id, checkpoint)
    if checkpoint is None:
        held.enter_context(in_use(directory.path))
    started -= directory.elapsed
    log(INFO, "slora-flwr %s, run directory %s", installed_version(), directory.path)
    if moved and privacy is None:
        were = counted(moved, "example was", "examples were")
        log(INFO, "%s moved so that no client is empty", were)
    if checkpoint is None:
        for warning in foresee(config) if trainer.task.has_classes else []:
            log(WARNING, "%s", warning)
        directory.release.write_resolved(config, {})
        directory.release.write_config(config)
        number = 0
    else:
        number = checkpoint.facts["round"]
        directory.event(Resumed(round=number, run=str(run_id)))
        log(INFO, "resuming after round %d of %d", number, config.rounds)
    held.enter_context(following.begin(directory, number))
    try:
        fleet.precision = precision_on(config, best_device())
        log(INFO, "computing in %s", fleet.precision)
        fleet.gather(grid, directory.event, directory.lineage)
        if isinstance(fleet, OwnDataFleet) and fleet.classes:
            trainer = Trainer(config, fleet.classes)
            share(trainer.model)
        resolved = resolve(trainer, moved)
        if privacy is not None:
            resolved["privacy"] = privacy.facts(config.rounds)
        elif config.privacy.of_examples:
            foreseen = ExampleLedger(config)
            foreseen.foresee(fleet.clients)
            resolved["privacy"] = foreseen.facts(fleet.sizes)
        if checkpoint is None:
            made_by = {"name": engine, "nodes": len(list(grid.get_node_ids()))}
            directory.release.write_resolved(config, resolved, made_by)
        trainer.model.detach()
        before = trainer.sample_test()
        strategy = PhasedStrategy(
            trainer, directory, fleet, checkpoint, privacy, progress
        )
        strategy.run(grid)
    except Exception as error:
        with suppress(RunDirectoryError):  # which may be the error itself
            directory.event(Stopped(reason=f"{type(error).__name__}: {error}"))
        raise
    except (KeyboardInterrupt, SystemExit) as error:  # Ctrl-C, `flwr stop`
        with suppress(RunDirectoryError):
            directory.event(Stopped(reason=INTERRUPTED))
        log(INFO, "run interrupted, run directory %s", directory.path)
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(how_to_resume(directory.path)) from error
        raise
    seconds = time.perf_counter() - started
    summary = summarise(trainer, strategy, directory, seconds)
    if privacy is not None:
        summary["privacy"] = privacy.facts(config.rounds)
    elif strategy.spent is not None:
        summary["privacy"] = strategy.spent.facts(fleet.sizes)
    with strategy.phase.on_average() as state:
        trainer.model.adapter.load(state)
        after = trainer.sample_test()
    export(directory.release, trainer, strategy.phase, summary)
    # Last, since a run that has it counts as finished.
    directory.write_summary(summary)
    fleet.dismiss(grid)
    # That of nodes on this machine that have not answered.
    shutil.rmtree(run_folder(directory.lineage), ignore_errors=True)
    console = Console(width=80)  # Flower's log may be read in any terminal
    print_table(console, closing_table(summary))
    if after:
        console.print(samples_table(before, after))
    if "warning" in summary:
        console.print(summary["warning"], style="bold", markup=False, highlight=False)
    log(INFO, "run directory %s", directory.path)
    return summary


def _shared_data_fleet(trainer: Trainer, expected: dict[str, object]) -> Fleet:
    expected |= {
        "backbone": trainer.model.backbone.digest,
        "classes": trainer.data.classes_digest,
    }
    clients = trainer.config.clients
    sizes = None
    if clients.count:
        expected["partition"] = trainer.data.partition_digest
        sizes = dict(enumerate(trainer.data.partition.sizes.tolist()))
    return Fleet(expected, clients.min_nodes, clients.deadline, sizes)


def _own_data_fleet(trainer: Trainer, expected: dict[str, object]) -> Fleet:
    config = trainer.config
    expected["backbone"] = digest_of(config.model, find_task(config))
    return OwnDataFleet(
        expected,
        config.clients.min_nodes,
        config.clients.deadline,
        labels={*config.data.label_names},
        # Until the nodes' labels are known, the classes are those of the test data.
        also=trainer.data.classes,
        min_examples=config.clients.min_examples,
        has_classes=trainer.task.has_classes and not config.privacy.of_examples,
    )
