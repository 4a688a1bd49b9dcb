"""Compare the cost of a simulated round beyond its training.

- `bare`: the same clients trained one after the other in one process on all cores,
  without Flower.
- `bare, parallel`: the same, in one process per core with a share of the clients.
- `slora-flwr`: `flwr run` in simulation, with as many nodes as cores.
- `usual recipe`: benchmarks/usual_recipe, federated LoRA as in Flower's examples: one
  node and one message per client, the model loaded for each message, one array per
  tensor, `send_and_receive`.

All train the same clients on the same batches with LoRA of the same rank. The seconds
of a round are means over the rounds after the first; everything else is start-up.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from simulation import APP, round_ends, simulate

WAYS = ("bare", "bare, parallel", "slora-flwr", "usual recipe")
CORES = os.cpu_count() or 1


def run_config(options: argparse.Namespace) -> dict[str, Any]:
    """Return the run config that all contenders use."""
    return {
        "method": "lora",
        "rounds": options.rounds,
        "model.name": options.model,
        "data.name": options.data,
        "data.max-length": options.length,
        "data.max-test": 50,
        "clients.count": options.clients,
        "clients.per-round": options.clients,
        "clients.partitioner": "virtual",
        "clients.alpha": 1.0,
        "clients.examples": options.examples,
        "run.eval-every": 0,
    }


def bare(config: dict[str, Any], first: int = 0, step: int = 1) -> list[float]:
    """Train every `step`-th client in this process, and return the rounds' ends."""
    from slora_flwr.config import parse
    from slora_flwr.training.trainer import Trainer

    trainer = Trainer(parse(config))
    [phase] = trainer.schedule
    state = trainer.model.attach(phase).state()
    ends = []
    for server_round in range(1, phase.rounds + 1):
        for client in range(first, trainer.config.clients.count, step):
            trainer.train_client(client, state, phase, server_round)
        ends.append(time.perf_counter())
    return ends


def parallel() -> list[float]:
    """Train in one process per core, and return the rounds' ends."""
    children = [
        subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--child", str(first)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for first in range(CORES)
    ]
    ends = [json.loads(child.communicate()[0]) for child in children]
    return [max(of_round) for of_round in zip(*ends, strict=True)]


def measure(way: str, options: argparse.Namespace) -> dict[str, float]:
    """Measure one contender."""
    output = ""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        config = run_config(options)
        begun = time.perf_counter()
        if way == "bare":
            ends = bare(config)
        elif way == "bare, parallel":
            ends = parallel()
        elif way == "slora-flwr":
            config["run.dir"] = str(folder / "run")
            values = " ".join(f"{key}={json.dumps(v)}" for key, v in config.items())
            output = simulate(APP, values, CORES, folder).output
            ends = round_ends(folder / "run", options.clients)
        else:
            recipe = folder / "recipe.json"
            recipe.write_text(json.dumps(config))
            app = Path(__file__).parent / "usual_recipe"
            values = f'recipe="{recipe}"'
            output = simulate(app, values, options.clients, folder).output
            # The first time is that of the evaluation before round 1.
            ends = json.loads(Path(f"{recipe}.times").read_text())[1:]
        wall = time.perf_counter() - begun
    if len(ends) < options.rounds:
        raise SystemExit(f"the run did not complete\n{output}")
    seconds = (ends[-1] - ends[0]) / (len(ends) - 1)
    return {
        "round": seconds,
        "start": wall - options.rounds * seconds,
        "clients a minute": 60 * options.clients / seconds,
    }


def main() -> None:
    """Measure all contenders, and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", default="stdlib-docs")
    parser.add_argument("--clients", type=int, default=100, help="all in every round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=32, help="per client")
    parser.add_argument("--length", type=int, default=32, help="tokens per text")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(bare(run_config(options), options.child, CORES)))
        return
    found = {way: measure(way, options) for way in WAYS}
    ours = found["slora-flwr"]
    ratios = {
        f"round, slora-flwr / {way}": ours["round"] / found[way]["round"]
        for way in ("bare", "bare, parallel")
    }
    ratios["clients a minute, slora-flwr / usual recipe"] = (
        ours["clients a minute"] / found["usual recipe"]["clients a minute"]
    )
    if options.json:
        print(json.dumps({"figures": found, "ratios": ratios}, indent=2))
        return
    for way, figures in found.items():
        told = ", ".join(f"{name} {value:.1f}" for name, value in figures.items())
        print(f"{way:<12} {told}")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")


if __name__ == "__main__":
    main()
