"""Measure a simulation's time and memory against the size of its client population.

Each population trains the same number of `virtual` clients of the same size per round,
by `flwr run` with one node per core. The last row has one Flower node per client.
Seconds are means over the rounds after the first; everything else is start-up. Memory
is the resident size of the largest process of each role, sampled every second.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from simulation import APP, round_ends, simulate


def measure(
    clients: int, per_round: int, nodes: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Measure one population; 0 nodes stands for one per client."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        config = {
            "method": options.method,
            "rounds": options.rounds,
            "model.name": options.model,
            "data.max-length": options.length,
            "data.max-test": 50,
            "clients.count": clients if nodes else 0,
            "clients.per-round": per_round,
            "clients.partitioner": "virtual",
            "clients.examples": options.examples,
            "run.eval-every": 0,
            "run.dir": str(folder / "run"),
        }
        run_config = " ".join(f"{key}={json.dumps(v)}" for key, v in config.items())
        run = simulate(APP, run_config, nodes or clients, folder)
        ends = round_ends(folder / "run", per_round)
    if len(ends) < options.rounds:
        raise SystemExit(f"the run did not complete\n{run.output}")
    seconds = (ends[-1] - ends[0]) / (len(ends) - 1)
    return {
        "clients": clients,
        "nodes": nodes or clients,
        "milliseconds a client": 1e3 * seconds / per_round,
        "start": run.seconds - options.rounds * seconds,
        **{f"{role} MB": size / 1e6 for role, size in sorted(run.bytes.items())},
    }


def main() -> None:
    """Measure all populations, and print ratios to the first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--method", default="lora")
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[1_000, 10_000, 100_000]
    )
    parser.add_argument("--per-round", type=int, default=1_000)
    parser.add_argument("--examples", type=int, default=32, help="per client")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=32, help="tokens per text")
    parser.add_argument(
        "--nodes", type=int, default=1_000, help="in the run with one node per client"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    found = [measure(n, options.per_round, cores, options) for n in options.clients]
    if options.nodes:
        cohort = min(options.per_round, options.nodes)
        found.append(measure(options.nodes, cohort, 0, options))
    ratios = [
        {
            key: row[key] / found[0][key]
            for key in row
            if key not in ("clients", "nodes")
        }
        for row in found
    ]
    if options.json:
        print(json.dumps({"figures": found, "ratios": ratios}, indent=2))
        return
    for row, ratio in zip(found, ratios, strict=True):
        print(f"{row['clients']} clients on {row['nodes']} nodes")
        for key, value in ratio.items():
            print(f"  {key:<22} {row[key]:8.1f}  ratio {value:.2f}")


if __name__ == "__main__":
    main()
