"""Run directories as runs leave them, without the runs."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slora_flwr.config import parse
from slora_flwr.runs.directory import RunDirectory
from slora_flwr.runs.events import (
    EVENTS,
    ClassRecord,
    ClientRecord,
    ClientsFailed,
    HandedOff,
    RecordedRound,
    Stopped,
    to_line,
)
from tests.support.runs import Config

# Of each client in each round: the mean payload, in bytes, and seconds of training.
DOWN, UP, SECONDS = 2_000_000, 1_000_000, {0: 3.0, 1: 5.0}


def write_run(
    path: Path,
    config: Config | None = None,
    accuracies: Sequence[float] = (0.2, 0.3, 0.4),
    *,
    failures: Sequence[str] = (),
    energies: Mapping[str, float] | None = None,
    ended: bool = True,
    planned: int | None = None,
    classes: ClassRecord | None = None,
    facts: Mapping[str, Any] | None = None,
    perplexities: Sequence[float] = (),
) -> Path:
    """Write what a run leaves in whose every round two clients took part."""
    common: Config = {"method": "lora", "rounds": 6, "run.dir": str(path)}
    parsed = parse(common | {"clients.per-round": 2} | (config or {}))
    directory = RunDirectory(parsed, 1)
    directory.release.write_config(parsed)
    resolved = {"classes": ["a", "b"], "test_examples": 8, **(facts or {})}
    directory.release.write_resolved(parsed, resolved)
    names = ["round", "phase", "direction", "clients", "payload_bytes", "message_bytes"]
    names += ["planned_payload_bytes"] if planned is not None else []
    lines = [names]
    for number, accuracy in enumerate(accuracies, start=1):
        is_sparse = parsed.method == "slora" and number <= parsed.sparse.rounds
        phase = "sparse" if is_sparse else "lora"
        for direction, size in (("down", DOWN), ("up", UP)):
            line = [number, phase, direction, 2, 2 * size, 2 * size + 50]
            lines.append([str(cell) for cell in line])
            if planned is not None:
                lines[-1].append(str(planned))
        done = RecordedRound(
            seconds=10.0 * number,
            phase=phase,
            cohort=[0, 1, 7],
            clients={
                client: ClientRecord(10, 1.0 / number, seconds)
                for client, seconds in SECONDS.items()
            },
            round=number,
            replied=len(SECONDS),
            train_loss=1.0 / number,
            payload_bytes=number * 2 * (UP + DOWN),
            metrics={"accuracy": accuracy, "macro_f1": accuracy / 2, "loss": 1.0},
            classes=classes if number == len(accuracies) else None,
        )
        if perplexities:
            others = {"perplexity": perplexities[number - 1], "rouge_l": number / 10}
            metrics = {"accuracy": accuracy, "loss": 1.0, **others}
            done = replace(done, metrics=metrics)
        line = json.loads(to_line(done)) | {"new_fact": "of a later version"}
        with (path / EVENTS).open("a") as file:
            file.write(json.dumps(line) + "\n")
    with (path / "ledger.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    for reason in failures:
        directory.event(ClientsFailed(round=1, node=4, clients=[7], reason=reason))
    if energies:
        directory.event(HandedOff(base="residual", energies=dict(energies), took=0.1))
    if ended:
        summary = {"seconds": 99.0, "phases": {}, "same_rounds": {}}
        chance = {} if perplexities else {"majority_accuracy": 0.1}
        directory.write_summary(summary | chance)
    else:
        directory.event(Stopped(reason="TooFewRepliesError: 0 good replies twice"))
    return path
