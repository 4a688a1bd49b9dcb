"""What a simulated round costs beside its training, against two others in one run.

- `bare`: the same clients trained one after the other in one process, without Flower.
- `slora-flwr`: `flwr run` in simulation, as many nodes as cores.
- `usual recipe`: benchmarks/usual_recipe, federated LoRA as Flower's examples have it:
  a node and a message for each client, the model loaded for each, an array for each
  tensor, `send_and_receive`.

All three train the same clients on the same batches with LoRA of the same rank. A
round's seconds are those of the rounds after the first; all else is start-up.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

APP = Path(__file__).parents[1]
FLWR = [sys.executable, "-m", "flwr.cli.app"]
WAYS = ("bare", "slora-flwr", "usual recipe")


def run_config(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Give the run config that all three follow."""
    return {
        "method": "lora",
        "rounds": options.rounds,
        "model.name": options.model,
        "data.name": options.data,
        "data.max-length": options.length,
        "data.max-test": 50,
        "clients.count": options.clients,
        "clients.per-round": options.clients,
        "clients.partitioner": "iid",
        "run.eval-every": 0,
        "run.dir": str(folder / "run"),
    }


def bare(config: dict[str, Any]) -> list[float]:
    """Train all clients in this process, on all cores; give the rounds' ends."""
    from slora_flwr.config import parse
    from slora_flwr.training.worker import Worker

    worker = Worker(parse(config))
    [phase] = worker.schedule
    state = worker.enter(phase).state()
    ends = []
    for server_round in range(1, phase.rounds + 1):
        for client in range(worker.config.clients.count):
            worker.train_client(client, state, phase, server_round)
        ends.append(time.perf_counter())
    return ends


def simulated(
    app: Path, run: str, nodes: int, folder: Path, config: dict[str, Any]
) -> list[float]:
    """Run an app by `flwr run` on a SuperLink of its own; give the rounds' ends."""
    home = folder / "flower"
    ports = [str(_free_port()) for _ in range(2)]
    environment = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": ports[0],
        "FLWR_LOCAL_CONTROL_API_PORT": ports[1],
        "SLORA_HOME": str(folder / "slora"),
    }
    resources = f"num-supernodes={nodes} client-resources-num-cpus=1"
    options = ["--run-config", run, "--federation-config", resources]
    try:
        # Not in the checkout, whose code the actors would find before the bundle's.
        done = subprocess.run(
            [*FLWR, "run", str(app), "--stream", *options],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        ends = _ends(folder, config)
        if len(ends) < config["rounds"]:
            raise SystemExit(f"the run did not end\n{done.stdout}")
    finally:
        for process in psutil.process_iter():
            try:
                if process.environ().get("FLWR_HOME") == str(home):
                    process.send_signal(signal.SIGKILL)
            except psutil.Error:  # gone, or another user's
                continue
    return ends


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _ends(folder: Path, config: dict[str, Any]) -> list[float]:
    usual = folder / "recipe.json.times"
    if usual.exists():
        # The first is that of the evaluation before round 1.
        return list(json.loads(usual.read_text()))[1:]
    events = Path(config["run.dir"], "events.jsonl")
    if not events.exists():
        return []
    rounds = map(json.loads, events.read_text().splitlines())
    return [event["seconds"] for event in rounds if event["event"] == "round"]


def measure(way: str, options: argparse.Namespace) -> dict[str, float]:
    """Run one of the three ways."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        config = run_config(options, folder)
        begun = time.perf_counter()
        if way == "bare":
            ends = bare(config)
        elif way == "slora-flwr":
            run = " ".join(f"{key}={json.dumps(v)}" for key, v in config.items())
            ends = simulated(APP, run, os.cpu_count() or 1, folder, config)
        else:
            recipe = folder / "recipe.json"
            recipe.write_text(json.dumps(config))
            app = Path(__file__).parent / "usual_recipe"
            run = f'recipe="{recipe}"'
            ends = simulated(app, run, options.clients, folder, config)
        wall = time.perf_counter() - begun
    seconds = (ends[-1] - ends[0]) / (len(ends) - 1)
    return {
        "round": seconds,
        "start": wall - options.rounds * seconds,
        "clients a minute": 60 * options.clients / seconds,
    }


def main() -> None:
    """Measure all three, and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", default="stdlib-docs")
    parser.add_argument("--clients", type=int, default=100, help="all in every round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=32, help="tokens of a text")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = {way: measure(way, options) for way in WAYS}
    ratios = {
        "round, slora-flwr / bare": found["slora-flwr"]["round"]
        / found["bare"]["round"],
        "clients a minute, slora-flwr / usual recipe": found["slora-flwr"][
            "clients a minute"
        ]
        / found["usual recipe"]["clients a minute"],
    }
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
