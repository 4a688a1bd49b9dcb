"""What the server writes of a run: its rounds, failures and states."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from logging import INFO, WARNING
from statistics import fmean

from flwr.common.logger import log

from slora_flwr.common.text import printable
from slora_flwr.planning.rounds import PlannedRound
from slora_flwr.runs.directory import RunDirectory
from slora_flwr.runs.events import ClientsFailed, Handover, RecordedRound
from slora_flwr.runs.snapshot import Snapshot
from slora_flwr.server.phase import ActivePhase


class Journal:
    """The record of a run.

    Parameters
    ----------
    directory : RunDirectory
        Where it is written.
    name_of : Callable
        Returns what logs call a node.

    Attributes
    ----------
    history : list[RecordedRound]
        The closed rounds, without who took part. Their seconds begin with the run's
        first round.
    best_round : int
        The round of the best accuracy on the server; 0 before the first evaluation.
    planned : Mapping[int, PlannedRound]
        What each round is predicted to send.
    """

    def __init__(self, directory: RunDirectory, name_of: Callable[[int], str]) -> None:
        self.directory = directory
        self.history: list[RecordedRound] = []
        self.planned: Mapping[int, PlannedRound] = {}
        self._name_of = name_of
        self._started = time.perf_counter()
        self._best, self.best_round = -1.0, 0
        # Names the base that is on the disk.
        self._base: str | None = None
        # What each node's network interface had moved, down and up, at its last reply.
        self._moved: dict[int, Sequence[int]] = {}

    def fail(
        self, server_round: int, node: int, clients: list[int], reason: object
    ) -> None:
        """Record that clients of a node are left out of a round, and why."""
        reason = printable(reason)
        log(
            WARNING, "%s, clients %s left out: %s", self._name_of(node), clients, reason
        )
        self.directory.event(
            ClientsFailed(round=server_round, node=node, clients=clients, reason=reason)
        )

    def wire_bytes(self, node: int, moved: Sequence[int]) -> dict[str, int]:
        """Return what a node's network interface moved since its last reply.

        Parameters
        ----------
        node : int
            Its id.
        moved : Sequence[int]
            What it has moved so far, down and up; empty where it does not count.

        Returns
        -------
        dict
            Bytes by direction; empty where it did not count now and then.
        """
        before = self._moved.get(node)
        if moved:
            self._moved[node] = moved
        if not (moved and before):
            return {}
        return {
            # A container that was made anew counts from zero.
            way: now - then if now >= then else now
            for way, now, then in zip(("down", "up"), moved, before, strict=True)
        }

    def hand_over(self, handoff: Handover, rank: int) -> None:
        """Record how a phase was primed."""
        energies = handoff.energies.values()
        log(
            INFO,
            "handoff: rank %d keeps %.1f%% of the delta's energy (%.1f%% at worst)",
            rank,
            100 * fmean(energies),
            100 * min(energies),
        )
        self.directory.event(handoff)

    def close(self, done: RecordedRound, phase: ActivePhase) -> RecordedRound:
        """Record a round and the state it led to; return it with its seconds."""
        done = replace(done, seconds=time.perf_counter() - self._started)
        self.history.append(replace(done, cohort=[], clients={}))
        self.directory.event(done)
        self._save("last", done.round, phase)
        accuracy = done.metrics.get("accuracy", -1.0)
        if accuracy > self._best:
            self._best, self.best_round = accuracy, done.round
            self._save("best", done.round, phase)
            self.directory.copy_state("base", "best-base")
        return done

    def snapshot(self) -> Snapshot:
        """Return what `restore` takes."""
        history = [asdict(done) for done in self.history]
        best = [self._best, self.best_round]
        return Snapshot({"history": history, "best": best})

    def restore(
        self, snapshot: Snapshot, server_round: int, phase: ActivePhase
    ) -> None:
        """Go on after a round; the directory may hold the states of a later one."""
        facts = snapshot.facts
        self.history = [RecordedRound(**done) for done in facts["history"]]
        self._started -= self.history[-1].seconds
        self._best, self.best_round = facts["best"]
        self._save("last", server_round, phase)
        self.directory.drop_checkpoints(self.best_round)

    def _save(self, name: str, server_round: int, phase: ActivePhase) -> None:
        """Write a state, and the base that it stands on if that is another now."""
        base = phase.base.digest
        if base != self._base:
            if state := phase.base_state():
                self.directory.save_state("base", state, digest=base)
            else:
                self.directory.drop_state("base")
            self._base = base
        facts = {"round": str(server_round), "phase": phase.name, "base": base}
        self.directory.save_state(name, phase.state, **facts)
