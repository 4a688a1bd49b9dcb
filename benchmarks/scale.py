"""Seconds and memory of a simulation against the size of its client population.

Each population trains the same number of clients a round, `virtual` ones of the same
size, by `flwr run` with a node for each core; the last row has a Flower node for every
client. Seconds are those of the rounds after the first; all else is start-up. Memory is
the resident size of the largest process of each role, looked at every second.
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
    """Run one population; nodes 0 is one for each client."""
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
        raise SystemExit(f"the run did not end\n{run.output}")
    seconds = (ends[-1] - ends[0]) / (len(ends) - 1)
    return {
        "clients": clients,
        "nodes": nodes or clients,
        "milliseconds a client": 1e3 * seconds / per_round,
        "start": run.seconds - options.rounds * seconds,
        **{f"{role} MB": size / 1e6 for role, size in sorted(run.bytes.items())},
    }


def main() -> None:
    """Measure all populations, and print ratios to the smallest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--method", default="lora")
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[1_000, 10_000, 100_000]
    )
    parser.add_argument("--per-round", type=int, default=1_000)
    parser.add_argument("--examples", type=int, default=32, help="of a client")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=32, help="tokens of a text")
    parser.add_argument(
        "--nodes", type=int, default=1_000, help="of the run with a node a client"
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
