"""The strategy: a schedule of phases, round by round, over Flower's grid."""

import math
from collections.abc import Mapping
from dataclasses import replace
from logging import INFO, WARNING
from typing import Any

from flwr.common.logger import log
from flwr.serverapp import Grid

from slora_flwr.common.memory import return_freed
from slora_flwr.common.tensors import State
from slora_flwr.common.text import counted
from slora_flwr.config import flatten
from slora_flwr.planning.rounds import plan_rounds
from slora_flwr.reports.progress import CohortProgress, progress_line
from slora_flwr.runs.checkpoint_files import list_checkpoints
from slora_flwr.runs.directory import RunDirectory
from slora_flwr.runs.events import METRICS, ClassRecord
from slora_flwr.runs.snapshot import Snapshot
from slora_flwr.server.fleet import Fleet
from slora_flwr.server.guarantee import Guarantee
from slora_flwr.server.journal import Journal
from slora_flwr.server.phase import ActivePhase
from slora_flwr.server.privacy import ExampleLedger
from slora_flwr.server.round import Round
from slora_flwr.server.secure_round import SecureRound
from slora_flwr.tasks.base import Evaluation, Task
from slora_flwr.training.trainer import Trainer


class TooFewRepliesError(RuntimeError):
    """A round failed twice, most often for want of `clients.min-replies` replies."""


class PhasedStrategy:
    """Run the phases of a method, with a handoff between them.

    It does not subclass Flower's `Strategy`, whose `start` runs a fixed number of equal
    rounds. Here the config sets the rounds of each phase, a phase can end early, and a
    run can resume after any round.

    Parameters
    ----------
    trainer : Trainer
        The server's trainer, for evaluation, the handoff and the layout of states.
    directory : RunDirectory
        The run's directory.
    fleet : Fleet
        The nodes, already gathered.
    checkpoint : Snapshot or None
        The checkpoint to resume from; None for a new run.
    privacy : Guarantee or None
        The run's privacy; None without.
    progress : CohortProgress or None
        Tells how much of a cohort has answered; None for one that uses the log.

    Attributes
    ----------
    phase : ActivePhase
        The phase under way; after the run, the last one.
    journal : Journal
        The record of the closed rounds.
    lengths : list[int]
        Rounds of each phase: actual if finished, else the maximum.
    spent : ExampleLedger or None
        With privacy of examples, what clients have spent of it.
    """

    def __init__(
        self,
        trainer: Trainer,
        directory: RunDirectory,
        fleet: Fleet,
        checkpoint: Snapshot | None = None,
        privacy: Guarantee | None = None,
        progress: CohortProgress | None = None,
    ) -> None:
        config = trainer.config
        self.journal = Journal(directory, trainer.task, fleet.name)
        self.lengths = [phase.rounds for phase in trainer.schedule]
        self._config, self._trainer, self._fleet = config, trainer, fleet
        self._privacy = privacy
        self.spent = ExampleLedger(config) if config.privacy.of_examples else None
        if privacy is not None:
            # How many answered, and how long it took, depend on who was drawn.
            progress = CohortProgress(first=math.inf)
        self._progress = progress or CohortProgress()
        self._server_round = 0
        # Each client's last round that counted.
        self._counted: dict[int, int] = {}
        if checkpoint is None:
            self.phase = ActivePhase.begin(trainer)
        else:
            self._restore(checkpoint)

    def run(self, grid: Grid) -> None:
        """Run all phases, or the rest of them after a checkpoint.

        Raises
        ------
        TooFewRepliesError
            If a round fails twice; the last state is in the run directory.
        HandoffError
            If a handoff did not prime a phase as its config says.
        """
        self._announce()
        while True:
            self._run_phase(grid)
            if self.phase.index == len(self.lengths) - 1:
                return
            self.phase = ActivePhase.begin(self._trainer, self.phase)
            if self.phase.handoff is not None:
                rank = self.phase.phase.adapter_type.primed_rank(self._config)
                self.journal.record_handoff(self.phase.handoff, rank)

    def _run_phase(self, grid: Grid) -> None:
        """Run the remaining rounds of the phase under way."""
        phase, index = self.phase, self.phase.index
        most = phase.phase.rounds
        if index == len(self.lengths) - 1:
            # The last phase gets the rounds an open phase left.
            most = self._config.rounds - sum(self.lengths[:index])
        self.lengths[index] = most
        plan = plan_rounds(
            self._config,
            self._trainer.model.backbone,
            self._fleet.clients,
            self.lengths,
        )
        self.journal.planned = {planned.number: planned for planned in plan}
        every = self._config.run.eval_every
        while phase.phase_round < most and not phase.has_ended(self.journal.history):
            phase.phase_round += 1
            self._server_round += 1
            held = self._train(grid)
            # The end of an open phase depends on its evaluations.
            is_last = phase.phase_round == most or phase.phase.is_open
            metrics: dict[str, float] = {}
            classes = None
            if is_last or (every > 0 and self._server_round % every == 0):
                with phase.on_average() as state:
                    average = phase.averaged.state
                    metrics, found = self._evaluate(held, grid, state, average)
                if found is not None and self._server_round == self._config.rounds:
                    classes = found.by_class
                if self._config.run.eval_plain:
                    plain, _ = self._evaluate(held, grid, phase.state, phase.sent())
                    metrics |= {f"plain_{name}": x for name, x in plain.items()}
            self._write(held, metrics, classes)
        self.lengths[index] = phase.phase_round

    def _train(self, grid: Grid) -> Round:
        """Train one round; repeat it once if it fails."""
        number, least = self._server_round, self._config.clients.min_replies
        for attempt, another in enumerate(("; trying once more", ""), start=1):
            held = self._make_round(number, attempt)
            is_held = held.train(grid)
            if self.spent is not None:
                asked = (c for clients in held.cohort.values() for c in clients)
                self.spent.note(self.phase.index, asked)
            if is_held:
                return held
            another = another if held.may_repeat else ""
            log(
                WARNING,
                "round %d %s; clients.min-replies is %d%s",
                number,
                held.failure,
                least,
                another,
            )
            if not held.may_repeat:
                break
        twice = " twice" if held.may_repeat else ""
        directory = self.journal.directory.path
        goes_on = ", from which run.resume continues"
        raise TooFewRepliesError(
            f"round {number} {held.failure}{twice}; clients.min-replies is {least}. "
            f"The run directory {directory} holds the rounds before it"
            + (goes_on if list_checkpoints(directory) else "")
        )

    def _make_round(self, number: int, attempt: int) -> Round:
        """Return an attempt at a round."""
        parts = (
            number,
            self._trainer,
            self.phase,
            self._fleet,
            self.journal,
            self._privacy,
            self._counted if self.phase.keeps_residuals else None,
            self._progress,
        )
        if self._config.secure.aggregation:
            return SecureRound(*parts, attempt=attempt)
        return Round(*parts)

    def _evaluate(
        self, held: Round, grid: Grid, state: State, sent: State
    ) -> tuple[dict[str, float], Evaluation | None]:
        """Return the metrics of a state on the clients and on the server.

        The server's own evaluation follows; None if it has no test data. `sent` is the
        part of the state that is sent to clients.
        """
        clients = held.evaluate(grid, sent)
        server = self._trainer.evaluate_test(state)
        # Without test data on the server, the clients' metrics are the run's.
        own = "client_" if len(self._trainer.data.tokenised.test) else ""
        task = self._trainer.task
        found = _metrics(task, clients, own) | _metrics(task, server)
        return found | self._trainer.probe(state), server

    def _write(
        self, held: Round, metrics: dict[str, float], classes: ClassRecord | None
    ) -> None:
        """Record a round with its state and checkpoint, and log the progress."""
        done = replace(held.recorded(metrics), classes=classes)
        if self.spent is not None:
            done = replace(done, epsilon=self.spent.facts(self._fleet.sizes)["epsilon"])
        done = self.journal.record_round(done, self.phase)
        # Otherwise it would hold secrets, or be for no resuming.
        if self._privacy is None and self.spent is None:
            # After the state, so that a checkpoint never refers to a missing one.
            self.journal.directory.save_checkpoint(
                self._server_round, self.journal.best_round, self._snapshot()
            )
        log(INFO, progress_line(self._config.rounds, done))
        return_freed()

    def _snapshot(self) -> Snapshot:
        """Return a snapshot for `_restore`."""
        facts = {"lengths": self.lengths, "counted": [*self._counted.items()]}
        snapshot = Snapshot.join(
            {
                "strategy": Snapshot(facts),
                "phase": self.phase.snapshot(),
                "journal": self.journal.snapshot(),
            }
        )
        snapshot.facts |= {
            "config": flatten(self._config),
            "identity": self._fleet.expected,
            "round": self._server_round,
            "agreed": self._fleet.agreed(),
        }
        return snapshot

    def _restore(self, checkpoint: Snapshot) -> None:
        """Restore the state after a round."""
        own = checkpoint.part("strategy").facts
        self._server_round = checkpoint.facts["round"]
        self.lengths, self._counted = own["lengths"], dict(own["counted"])
        self.phase = ActivePhase.restore(self._trainer, checkpoint.part("phase"))
        journal = checkpoint.part("journal")
        self.journal.restore(journal, self._server_round, self.phase)

    def _announce(self) -> None:
        """Log the schedule, and the cost of privacy."""
        for phase in self._trainer.schedule:
            recipe = phase.recipe
            differs = recipe.head_lr != recipe.lr
            log(
                INFO,
                "%s: %s of %s, %s of %s at lr %g%s, batch %d",
                phase.adapter,
                counted(phase.rounds, "round"),
                counted(self._config.clients.per_round, "client"),
                counted(recipe.epochs, "epoch"),
                recipe.optimizer,
                recipe.lr,
                f" (head {recipe.head_lr:g})" if differs else "",
                recipe.batch_size,
            )
        for phase in self._trainer.schedule:
            if phase.average != "none":
                told = "%s: the %s average of the states is evaluated"
                log(INFO, told, phase.adapter, phase.average)
        if self._privacy is not None:
            self._tell_privacy(self._privacy.facts(self._config.rounds))
        elif self._config.privacy.of_examples:
            foreseen = ExampleLedger(self._config)
            foreseen.foresee(self._fleet.clients)
            self._tell_privacy(foreseen.facts(self._fleet.sizes))

    def _tell_privacy(self, facts: Mapping[str, Any]) -> None:
        told = "privacy: noise multiplier %(noise_multiplier).3g, epsilon %(epsilon).3g"
        told += " at delta %(delta).2g after all rounds"
        if facts["unit"] == "example":
            told += ", for each example of the client that spends most"
        log(INFO, told, facts)


def _metrics(
    task: Task, found: Evaluation | None, prefix: str = ""
) -> dict[str, float]:
    if found is None:
        return {}
    names = (*task.metrics, *task.references)
    # JSON has no figure for a loss that overflowed.
    return {
        f"{prefix}{name}": value
        for name in METRICS
        if name in names and math.isfinite(value := float(getattr(found, name)))
    }
