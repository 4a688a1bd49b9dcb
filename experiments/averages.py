"""Evaluate rules of averaging on the checkpoints of finished runs, as CSV.

Run methods with `run.keep` of at least their rounds, then

    python experiments/averages.py RUN... > averages.csv

where RUN is a run directory. The rules average the states of a phase, each state with
all of its LoRA factors on their own, and with the products of the factors as the
package does. Methods whose rounds change the base are not covered.
"""

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from slora_flwr.aggregation.averaged_state import mix
from slora_flwr.common.tensors import State
from slora_flwr.config import parse
from slora_flwr.runs.checkpoint import read_checkpoint
from slora_flwr.runs.checkpoint_files import list_checkpoints
from slora_flwr.runs.reader import read_run
from slora_flwr.server.phase import ActivePhase
from slora_flwr.training.trainer import Trainer

Share = Callable[[int], float]


def ema(decay: float) -> Share:
    """Return the exponential rule, which begins as a mean."""
    return lambda n: max(1 / n, 1 - decay)


def power(exponent: int) -> Share:
    """Return the rule in which states weigh about as their number to a power.

    Polynomial-decay averaging: Shamir and Zhang, arXiv 1212.1824.
    """
    return lambda n: (exponent + 1) / (n + exponent)


RULES: dict[str, Share] = {
    "plain": lambda n: 1.0,
    **{f"ema-{decay}": ema(decay) for decay in (0.5, 0.7, 0.8, 0.9)},
    "uniform": lambda n: 1 / n,
    **{f"power-{exponent}": power(exponent) for exponent in (1, 2, 3, 7)},
}
COLUMNS = ("run", "method", "alpha", "seed", "phase", "round", "rule", "of")
FIGURES = ("accuracy", "macro_f1", "loss")


def by_entry(average: State, state: State, share: float) -> State:
    """Mix two states entry by entry, LoRA's factors too."""
    return {n: torch.lerp(average[n], tensor, share) for n, tensor in state.items()}


def evaluate(run: Path) -> list[dict[str, object]]:
    """Return a row for each evaluated round of a run, rule, and way of mixing."""
    recorded = read_run(run)
    config = parse({**recorded.config, "run.dir": "", "run.resume": ""})
    trainer = Trainer(config)
    evaluated = {done.round for done in recorded.evaluated}
    facts = [run.name, config.method, config.clients.alpha, config.seed]
    rows: list[dict[str, object]] = []
    averages: dict[tuple[str, str], State] = {}
    for path in list_checkpoints(run):
        checkpoint = read_checkpoint(path)
        phase = ActivePhase.restore(trainer, checkpoint.part("phase"))
        if phase.phase_round == 1:
            averages = {}
        number = checkpoint.facts["round"]
        for rule, share_of in RULES.items():
            share = share_of(phase.phase_round)
            for of, mixed in (("entries", by_entry), ("products", mix)):
                before = averages.get((rule, of), phase.state)
                average = (
                    phase.state if share == 1 else mixed(before, phase.state, share)
                )
                averages[rule, of] = average
                if number in evaluated:
                    found = trainer.evaluate_test(average)
                    values = [*facts, phase.name, number, rule, of]
                    row = dict(zip(COLUMNS, values, strict=True))
                    rows.append(row | {f: getattr(found, f) for f in FIGURES})
    return rows


if __name__ == "__main__":
    writer = csv.DictWriter(sys.stdout, [*COLUMNS, *FIGURES])
    writer.writeheader()
    for directory in sys.argv[1:]:
        writer.writerows(evaluate(Path(directory)))
