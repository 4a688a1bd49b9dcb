"""Audit differential privacy with a canary: bound epsilon from below by whole runs.

The guarantee bounds how well anyone can tell runs with some client from runs without
it. This script makes many runs of both kinds, tells them apart as well as it can, and
computes which epsilon its hits and false alarms prove (arXiv 1311.0776 for what they
say about epsilon, 2006.07709 for audits with a canary). A proven epsilon above the
claimed one shows a fault. One below shows only that this attack found none.

- *Adjacency* is that of the accountant: one client is added or removed. Without the
  canary, no node hosts it. The population that sampling divides by, its rate and the
  divisor of the sum are those of the config in both kinds of runs.
- *The canary* is the worst case that the mechanism permits. In place of training it
  returns the same direction each time, far longer than the bound. The other clients
  return zeros, since an adversary may know what they return.
- *The attack* has what the guarantee covers: the state that each round sends, and the
  final one in the run directory. Its score is the likelihood ratio of the states'
  steps along the canary's direction.

So this is a white-box audit of updates. What is audited is the path from an update to
the released states, by whole runs of the inline engine: clipping, a node's sum of whole
numbers, the draw of cohorts, noise, the divisor, several rounds. Training is not
audited, nor is the generator's entropy: here it is seeded.

The controls are broken on purpose. If their proven epsilon is not above the claimed
one, the audit is too weak to find anything.

Runs are rows of `runs.csv`, and a second call makes those that are missing:

    python -m experiments.audit --out experiments/results/audit --runs 400
"""

import argparse
import csv
import logging
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Message, MessageType
from safetensors.torch import load_file
from scipy.special import logsumexp
from scipy.stats import beta, binom

from slora_flwr.client.process import get_process
from slora_flwr.common.tensors import State
from slora_flwr.config import Value, parse
from slora_flwr.config.schedule import Phase
from slora_flwr.engines.inline import InlineGrid
from slora_flwr.server.privacy import Privacy
from slora_flwr.server.run import run
from slora_flwr.training.trainer import ClientUpdate
from slora_flwr.wire.messages import Instruction

CANARY, COUNT, BOUND, DELTA = 7, 20, 0.1, 0.01
CONFIG: dict[str, Value] = {
    "method": "head",
    "rounds": 3,
    "data.max-length": 8,
    "clients.count": COUNT,
    "clients.per-round": 5,
    "clients.partitioner": "virtual",
    "clients.examples": 1,
    "privacy.clip-norm": BOUND,
    "privacy.delta": DELTA,
    "run.eval-every": 0,
}
# The smallest data, since nothing is learnt from it.
TEXTS = "text,label\n" + "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(60))
# Each value of the canary's update before it is clipped.
FAR = 10.0


class Faint(np.random.Generator):
    """A generator whose normal numbers are a tenth of what they should be."""

    def normal(self, loc: Any = 0.0, scale: Any = 1.0, size: Any = None) -> Any:
        """Draw with a tenth of the standard deviation."""
        return super().normal(loc, scale / 10, size)


@dataclass(frozen=True)
class Setting:
    """What is claimed, and how the runs are made.

    Attributes
    ----------
    epsilon : float
        The claimed epsilon, at `DELTA`, after all rounds.
    accounted : int
        The mean number of clients in a round for which the noise is calibrated.
    per_round : int
        The mean number of clients in a round.
    generator : type
        The source of cohorts and noise.
    """

    epsilon: float
    accounted: int = 5
    per_round: int = 5
    generator: type[np.random.Generator] = np.random.Generator

    @cached_property
    def noise(self) -> float:
        """The noise multiplier that a run with this target has."""
        keys = {"clients.per-round": self.accounted, "privacy.epsilon": self.epsilon}
        return Privacy(parse(CONFIG | keys)).noise_multiplier


SETTINGS = {
    "epsilon 1": Setting(1.0),
    "epsilon 4": Setting(4.0),
    "control: a tenth of the noise": Setting(1.0, generator=Faint),
    "control: no sampling": Setting(1.0, accounted=1, per_round=COUNT),
    "epsilon 4, all clients": Setting(4.0, accounted=COUNT, per_round=COUNT),
}


class CanaryGrid(InlineGrid):
    """A node with a canary among its clients, or without it.

    Attributes
    ----------
    seen : dict[int, float]
        The states sent, along the canary's direction, by the round that began there.
    """

    def __init__(self, config: dict[str, Value], has_canary: bool) -> None:
        super().__init__(config)
        self.seen: dict[int, float] = {}
        self._has_canary = has_canary

    def _answer(self, message: Message) -> Message:
        kind = message.metadata.message_type
        if kind == MessageType.TRAIN:
            self._replace_training(message)
        reply = super()._answer(message)
        if kind == MessageType.QUERY and not self._has_canary:
            metrics = reply.content.metric_records["metrics"]
            for values in metrics.values():  # its clients' ids, and their sizes
                assert isinstance(values, list)
                del values[CANARY]
        return reply

    def _replace_training(self, message: Message) -> None:
        """Have the node's trainer note states, and return the canary's update."""
        context = self._contexts[message.metadata.dst_node_id]
        trainer = get_process(context, Instruction.read(message.content)).trainer

        def train_client(
            client: int,
            state: State,
            phase: Phase,
            server_round: int,
            until: float = math.inf,
            noise_multiplier: float | None = None,
        ) -> ClientUpdate:
            sent = {name: state[name] for name in trainer.model.adapter.returned()}
            self.seen.setdefault(server_round, along(sent))
            value = FAR if client == CANARY else 0.0
            update = {name: torch.full_like(t, value) for name, t in sent.items()}
            examples = int(trainer.data.partition.sizes[client])
            return ClientUpdate(update, 0.0, examples)

        trainer.train_client = train_client  # type: ignore[method-assign]


def along(state: State) -> float:
    """Return a state's component along the canary's direction, all values alike."""
    count = sum(tensor.numel() for tensor in state.values())
    return sum(float(t.double().sum()) for t in state.values()) / math.sqrt(count)


def score(steps: Iterable[tuple[int, float]], rate: float, noise: float) -> float:
    """Return the log of the likelihood ratio, with the canary to without it.

    Parameters
    ----------
    steps : Iterable[tuple[int, float]]
        Numbers of rounds, and how far the sum of updates moved along the canary's
        direction in them, over the bound: each round moves it by 0, or by 1 if the
        canary joins, and by noise.
    rate : float
        The probability with which a client joins a round.
    noise : float
        The noise multiplier.
    """
    total = 0.0
    for rounds, step in steps:
        joins = np.arange(rounds + 1)
        shift = (step * joins - joins**2 / 2) / (rounds * noise**2)
        total += float(logsumexp(shift + binom.logpmf(joins, rounds, rate)))
    return total


def observe(
    setting: Setting, has_canary: bool, seed: Sequence[int]
) -> list[tuple[int, float]]:
    """Make one run, and return its steps as `score` takes them."""
    with tempfile.TemporaryDirectory() as place, redirect_stdout(StringIO()):
        folder, texts = Path(place) / "run", Path(place) / "texts.csv"
        texts.write_text(TEXTS)
        config = CONFIG | {
            "data.name": str(texts),
            "clients.per-round": setting.per_round,
            "privacy.noise-multiplier": setting.noise,
            "run.dir": str(folder),
        }
        grid = CanaryGrid(config, has_canary)
        generator = setting.generator(np.random.PCG64(seed))
        run(grid, config, grid.run.run_id, generator, grid.share)
        last = load_file(folder / "checkpoints" / "last.safetensors")
    states = grid.seen | {parse(config).rounds + 1: along(last)}
    # A state is a sum divided by the clients expected; the canary moves the sum by
    # the bound. A round without clients sends no state.
    return [
        (number - since, (to - start) * setting.per_round / BOUND)
        for (since, start), (number, to) in pairwise(sorted(states.items()))
    ]


def attack(setting: Setting, has_canary: bool, seed: Sequence[int]) -> float:
    """Make one run, and return its score."""
    steps = observe(setting, has_canary, seed)
    return score(steps, setting.per_round / COUNT, setting.noise)


def bounds(hits: int, runs: int) -> tuple[float, float]:
    """Return Clopper and Pearson's bounds on a rate; each fails in 2.5% of cases."""
    low = beta.ppf(0.025, hits, runs - hits + 1) if hits else 0.0
    high = beta.ppf(0.975, hits + 1, runs - hits) if hits < runs else 1.0
    return float(low), float(high)


def prove(hits: int, with_canary: int, alarms: int, without: int) -> float:
    """Return the epsilon that a test's hits and false alarms prove, at `DELTA`.

    With rates p of hits and f of false alarms, (epsilon, delta) implies that p is at
    most exp(epsilon) f + delta, and 1 - f at most exp(epsilon) (1 - p) + delta. The
    lowest p and the highest f, from `bounds`, hold together in 95% of cases.

    Parameters
    ----------
    hits, alarms : int
        Runs in which the test says that the canary is there: those with it, and those
        without.
    with_canary, without : int
        The numbers of such runs.
    """
    p, f = bounds(hits, with_canary)[0], bounds(alarms, without)[1]
    shares = (p - DELTA, f), (1 - f - DELTA, 1 - p)
    proven = [math.log(more / less) for more, less in shares if more > 0]
    return max(0.0, *proven)


def count(
    threshold: float, with_canary: Sequence[float], without: Sequence[float]
) -> tuple[int, int, int, int]:
    """Return what `prove` takes, of the test whether a score exceeds a threshold."""
    hits = sum(found > threshold for found in with_canary)
    alarms = sum(found > threshold for found in without)
    return hits, len(with_canary), alarms, len(without)


def judge(
    with_canary: Sequence[float], without: Sequence[float]
) -> tuple[int, int, int, int]:
    """Return the counts of the best threshold of half the runs on the other half."""
    chosen, kept = (with_canary[::2], without[::2]), (with_canary[1::2], without[1::2])
    candidates = [*chosen[0], *chosen[1]]
    return count(max(candidates, key=lambda t: prove(*count(t, *chosen))), *kept)


def summarise(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return a row for each setting that has runs of both kinds."""
    summary = []
    for name, setting in SETTINGS.items():
        scores: dict[str, list[float]] = {"1": [], "0": []}
        for row in rows:
            if row["setting"] == name:
                scores[row["canary"]].append(float(row["score"]))
        if min(map(len, scores.values())) < 2:
            continue
        hits, with_canary, alarms, without = judge(scores["1"], scores["0"])
        (least, _), (_, most) = bounds(hits, with_canary), bounds(alarms, without)
        summary.append(
            {
                "setting": name,
                "claimed epsilon": f"{setting.epsilon:g}",
                "delta": f"{DELTA:g}",
                "noise multiplier": f"{setting.noise:.3f}",
                "runs": f"{len(scores['1'])} + {len(scores['0'])}",
                "hits": f"{hits} of {with_canary}",
                "hit rate above": f"{least:.3f}",
                "false alarms": f"{alarms} of {without}",
                "false alarm rate below": f"{most:.3f}",
                "proven epsilon": f"{prove(hits, with_canary, alarms, without):.2f}",
            }
        )
    return summary


def missing(path: Path, runs: int) -> Iterator[tuple[str, bool, int]]:
    """Yield the runs that a file lacks: setting, whether with the canary, number."""
    done = {(row["setting"], row["canary"], row["run"]) for row in read(path)}
    for name in SETTINGS:
        for number in range(runs):
            for has_canary in (True, False):
                if (name, str(int(has_canary)), str(number)) not in done:
                    yield name, has_canary, number


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file, none if it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Make the runs that are missing, and print the bounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--runs", type=int, default=400, help="of each kind")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "runs.csv"
    if not path.exists():
        path.write_text("setting,canary,run,score\n")
    for name, has_canary, number in missing(path, options.runs):
        seed = list(SETTINGS).index(name), number, int(has_canary)
        found = attack(SETTINGS[name], has_canary, seed)
        with path.open("a", newline="") as file:
            row = name, int(has_canary), number, f"{found:.6g}"
            csv.writer(file, lineterminator="\n").writerow(row)
    summary = summarise(read(path))
    with (options.out / "summary.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(summary[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(summary)
    for line in summary:
        print(", ".join(f"{name} {value}" for name, value in line.items()))


if __name__ == "__main__":
    main()
