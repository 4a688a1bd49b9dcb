"""The record of a run that the server keeps: rounds, failures, states."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from logging import INFO, WARNING
from statistics import fmean

from flwr.common.logger import log

from slora_flwr.common.text import printable
from slora_flwr.planning.rounds import PlannedRound
from slora_flwr.runs.directory import RunDirectory
from slora_flwr.runs.events import (
    ClientsFailed,
    HandedOff,
    NodeEvaluated,
    RecordedRound,
)
from slora_flwr.runs.snapshot import Snapshot
from slora_flwr.server.phase import ActivePhase
from slora_flwr.tasks.base import Evaluation, Task


class Journal:
    """Record a run in its directory and in the log.

    Parameters
    ----------
    directory : RunDirectory
        The run's directory.
    task : Task
        Says which round is best.
    name_of : Callable
        Returns a node's name for logs, by its id.

    Attributes
    ----------
    history : list[RecordedRound]
        The closed rounds, without their clients and classes. Seconds count from the
        start of the first round.
    best_round : int
        The round with the best score; 0 before the first evaluation.
    planned : Mapping[int, PlannedRound]
        The predicted bytes of each round.
    """

    def __init__(
        self, directory: RunDirectory, task: Task, name_of: Callable[[int], str]
    ) -> None:
        self.directory, self._task = directory, task
        self.history: list[RecordedRound] = []
        self.planned: Mapping[int, PlannedRound] = {}
        self._name_of = name_of
        self._started = time.perf_counter()
        self._best, self.best_round = -math.inf, 0
        # Digest of the base on disk.
        self._base: str | None = None
        # Bytes on each node's network interface at its last reply, down and up.
        self._totals: dict[int, Sequence[int]] = {}

    def record_failure(
        self, server_round: int, node: int, clients: list[int], reason: object
    ) -> None:
        """Record that a node's clients are left out of a round."""
        reason, name = printable(reason), self._name_of(node)
        log(WARNING, "%s, clients %s left out: %s", name, clients, reason)
        self.directory.event(
            ClientsFailed(
                round=server_round,
                node=node,
                name=name,
                clients=clients,
                reason=reason,
            )
        )

    def record_evaluation(
        self, server_round: int, node: int, found: Evaluation
    ) -> None:
        """Record what a node says of the state on its held-out examples."""
        self.directory.event(
            NodeEvaluated(
                round=server_round,
                node=node,
                name=self._name_of(node),
                examples=found.examples,
                loss=found.loss,
                accuracy=found.accuracy,
            )
        )

    def wire_bytes(self, node: int, totals: Sequence[int]) -> dict[str, int]:
        """Return the bytes on a node's network interface since its last reply.

        Parameters
        ----------
        node : int
            The node's id.
        totals : Sequence[int]
            Its count so far, down and up; empty if it does not count.

        Returns
        -------
        dict
            Bytes by direction; empty unless both replies have a count.
        """
        before = self._totals.get(node)
        if totals:
            self._totals[node] = totals
        if not (totals and before):
            return {}
        return {
            # A new container counts from zero again.
            way: now - then if now >= then else now
            for way, now, then in zip(("down", "up"), totals, before, strict=True)
        }

    def record_handoff(self, handoff: HandedOff, rank: int) -> None:
        """Record a handoff to factors of a rank."""
        energies = handoff.energies.values()
        log(
            INFO,
            "handoff: rank %d keeps %.1f%% of the delta's energy (%.1f%% at worst)",
            rank,
            100 * fmean(energies),
            100 * min(energies),
        )
        self.directory.event(handoff)

    def record_round(self, done: RecordedRound, phase: ActivePhase) -> RecordedRound:
        """Record a round and its state; return the round with its seconds."""
        done = replace(done, seconds=time.perf_counter() - self._started)
        self.history.append(replace(done, cohort=[], clients={}, classes=None))
        self.directory.event(done)
        self._save(done.round, phase)
        score = self._task.score(done.metrics)
        if score is not None and score > self._best:
            self._keep_best(score, done.round, phase)
        return done

    @property
    def best(self) -> dict[str, float] | None:
        """The task's goal in the best round, and the round; None before the first."""
        if not self.best_round:
            return None
        goal = self._task.goal
        # None if the state that was kept as the best of a round was not evaluated.
        found = self.history[self.best_round - 1].metrics.get(goal)
        return None if found is None else {goal: found, "round": self.best_round}

    def snapshot(self) -> Snapshot:
        """Return a snapshot for `restore`."""
        history = [asdict(done) for done in self.history]
        best = [self._best if self.best_round else None, self.best_round]
        return Snapshot({"history": history, "best": best})

    def restore(
        self, snapshot: Snapshot, server_round: int, phase: ActivePhase
    ) -> None:
        """Continue after a round. The directory may hold later states."""
        facts = snapshot.facts
        self.history = [RecordedRound(**done) for done in facts["history"]]
        self._started -= self.history[-1].seconds
        score, self.best_round = facts["best"]
        self._best = score if self.best_round else -math.inf
        self._save(server_round, phase)
        if self.directory.release.round_of("best") > server_round:
            # The best state of a round that is to be held again is none yet.
            score = self._task.score(self.history[-1].metrics)
            self._keep_best(-math.inf if score is None else score, server_round, phase)
        self.directory.drop_checkpoints(self.best_round)

    def _keep_best(self, score: float, number: int, phase: ActivePhase) -> None:
        """Keep the evaluated state of the last round as the best."""
        self._best, self.best_round = score, number
        evaluated = "averaged" if phase.is_averaged else "last"
        base = "averaged-base" if phase.averaged.weights else "base"
        self.directory.release.copy_state(evaluated, "best")
        self.directory.release.copy_state(base, "best-base")

    def _save(self, server_round: int, phase: ActivePhase) -> None:
        """Write the state and its average, and bases that are not on disk yet."""
        base = phase.base.digest
        if base != self._base:
            if state := phase.base_state():
                self.directory.release.save_state("base", state, digest=base)
            else:
                self.directory.release.drop_state("base")
            self._base = base
        facts = {"round": str(server_round), "phase": phase.name, "base": base}
        save, averaged = self.directory.release.save_state, phase.averaged
        save("last", phase.state, **facts)
        if averaged.weights:
            facts["base"] = f"averaged-{server_round}"
            save("averaged-base", averaged.weights, digest=facts["base"])
        else:
            self.directory.release.drop_state("averaged-base")
        if phase.is_averaged:
            with phase.on_average() as state:
                save("averaged", state, **facts)
        else:  # an earlier phase may have left one
            self.directory.release.drop_state("averaged")
