"""Measure the cost of a deployment's round beyond training, on this machine.

    python benchmarks/message_cost.py --model embedded --model minilm-l6-h384-uncased

For each way to run a node, the benchmark starts a SuperLink and two SuperNodes on
loopback, and `flwr run` trains both clients in every round. Times are those at which
the log lines of the SuperNode that answers last arrive. `fresh` handles each message in
a new process (node config `resident-seconds=0`), `resident` in the node's resident
worker, and `short poll` is `resident` under `python -m slora_flwr.client.supernode`.
Figures are medians over rounds, without the first and the last.
"""

import argparse
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from simulation import APP, free_ports

NODES = 2
TOOLS = Path(sys.executable).parent
SUPERNODE = [str(TOOLS / "flower-supernode")]
MODES: dict[str, tuple[list[str], str]] = {
    "fresh": (SUPERNODE, "resident-seconds=0"),
    "resident": (SUPERNODE, ""),
    "short poll": ([sys.executable, "-m", "slora_flwr.client.supernode"], ""),
}
# A SuperNode's log lines about a message.
STEPS = (
    "Receiving: train",
    "Received successfully",
    "Start `flwr-clientapp` process",
    "Sending: train",
    "Sent successfully",
)
PARTS = {
    "wait": "polls for the message, and the server",
    "transfer": "between SuperLink and SuperNode, both ways",
    "launch": "poll for the task, process start, Flower's imports",
    "handle": "bundle, imports and model load, or the socket; poll for the reply",
    "training": "as reported by the client; for fresh, including loading the data",
}
ALONE = """
import json, sys, time
times = [time.perf_counter()]
import flwr.supernode.cli
times.append(time.perf_counter())
import slora_flwr.client.handlers
times.append(time.perf_counter())
from slora_flwr.config import parse
from slora_flwr.training.trainer import Trainer
trainer = Trainer(parse(json.loads(sys.argv[1])))
trainer.model.backbone, trainer.data.tokenised
times.append(time.perf_counter())
print(json.dumps(times))
"""


def run_config(model: str, method: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Return a run config with little training and no evaluation before the end."""
    return {
        "method": method,
        "rounds": rounds,
        "sparse.rounds": 1,
        "model.name": model,
        "data.name": "stdlib-docs",
        "data.max-length": 32,
        "data.max-test": 50,
        # All but a few examples are held out.
        "data.validation": 0.96,
        "clients.count": 0,
        "clients.per-round": NODES,
        "clients.min-nodes": NODES,
        "clients.partitioner": "iid",
        "run.eval-every": 0,
        "run.dir": str(folder),
    }


class Logged:
    """A process, with the arrival time of each line of its log."""

    def __init__(
        self, command: list[str], folder: Path, environment: dict[str, str]
    ) -> None:
        self.lines: list[tuple[float, str]] = []
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line))

    def messages(self) -> list[list[float]]:
        """Return the times of the steps of each train message."""
        found: list[dict[str, float]] = []
        for seconds, line in self.lines:
            for step in STEPS:
                if step in line:
                    if step == STEPS[0]:
                        found.append({})
                    if found:
                        found[-1].setdefault(step, seconds)
        return [[times[step] for step in STEPS] for times in found]


def measure(mode: str, config: dict[str, Any]) -> dict[str, float]:
    """Run a deployment and return the seconds of a round and of its parts."""
    home = Path(config["run.dir"]).parent / "flower"
    home.mkdir()
    link, *ports = free_ports(1 + NODES)
    environment = {
        # No round waits for Flower's requests to the Internet.
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        **os.environ,
        # Flower looks here for the programs that it starts.
        "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "SLORA_HOME": str(home / "slora"),
    }
    (home / "config.toml").write_text(
        f'[superlink.here]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    )
    command, node_config = MODES[mode]
    nodes: list[Logged] = []
    superlink = [str(TOOLS / "flower-superlink"), "--insecure", f"--port={link}"]
    started = [Logged(superlink, home, environment)]
    try:
        _wait_for_port(link)
        for index, port in enumerate(ports):
            given = f"partition-id={index} num-partitions={NODES} {node_config}"
            to = ["--insecure", f"--superlink=127.0.0.1:{link}", f"--port={port}"]
            arguments = [*command, *to, f"--node-config={given}"]
            nodes.append(Logged(arguments, home, environment))
            started.append(nodes[-1])
        values = " ".join(f"{key}={json.dumps(v)}" for key, v in config.items())
        flwr = [str(TOOLS / "flwr"), "run", str(APP), "here", "--stream"]
        done = subprocess.run(
            [*flwr, f"--run-config={values}"],
            cwd=home,
            env=environment,
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )
        # `flwr run --stream` exits with 0 even if the run failed.
        if not Path(config["run.dir"], "summary.json").exists():
            logs = "".join(line for node in nodes for _, line in node.lines)
            raise SystemExit(f"{done.stdout}{done.stderr}\n{logs}")
    finally:
        for logged in started:
            os.killpg(logged.process.pid, signal.SIGTERM)
        for logged in started:
            logged.process.wait()
    return _summarise(Path(config["run.dir"]), nodes)


def _summarise(run: Path, nodes: list[Logged]) -> dict[str, float]:
    lines = (run / "events.jsonl").read_text().splitlines()
    rounds = [e for e in map(json.loads, lines) if e["event"] == "round"]
    sent = [node.messages() for node in nodes]
    found: dict[str, list[float]] = {"round": [], **{part: [] for part in PARTS}}
    for index, (before, event) in enumerate(pairwise(rounds[:-1]), start=1):
        seconds = event["seconds"] - before["seconds"]
        # The node whose reply ends the round.
        client = max(range(NODES), key=lambda node: sent[node][index][-1])
        receiving, received, started, sending, end = sent[client][index]
        started = max(started, received)  # a long message may arrive after the start
        training = event["clients"][str(client)]["seconds"]
        found["round"].append(seconds)
        found["wait"].append(seconds - (end - receiving))
        found["transfer"].append(received - receiving + end - sending)
        found["launch"].append(started - received)
        found["handle"].append(sending - started - training)
        found["training"].append(training)
    return {name: round(median(values), 2) for name, values in found.items()}


def alone(config: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of imports and loading in a separate process."""
    command = [sys.executable, "-c", ALONE, json.dumps(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    times = json.loads(done.stdout.splitlines()[-1])
    names = ("Flower's imports", "torch and transformers", "model and data")
    steps = [after - before for before, after in pairwise(times)]
    return {name: round(step, 2) for name, step in zip(names, steps, strict=True)}


def _wait_for_port(port: int) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def _print_table(model: str, result: dict[str, Any]) -> None:
    print(f"\n{model}: in a separate process, {result['alone']}")
    modes: dict[str, dict[str, float]] = result["modes"]
    print(f"\n| seconds | {' | '.join(modes)} | |")
    print("|---|" + "---:|" * len(modes) + "---|")
    texts = {"round": "a round", **PARTS}
    for name, text in texts.items():
        figures = " | ".join(f"{mode[name]:.2f}" for mode in modes.values())
        print(f"| {name} | {figures} | {text} |")
    training = modes["resident"]["training"]
    beside = {mode: figures["round"] - training for mode, figures in modes.items()}
    times = " | ".join(
        f"{beside['fresh'] / seconds:.1f}" for seconds in beside.values()
    )
    print(f"| speed-up over fresh | {times} | of a round without {training} s |")


def main() -> None:
    """Measure every mode for every model, and print tables or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", help="model.name; repeatable")
    parser.add_argument("--method", default="lora")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", action="store_true", help="print only JSON")
    given = parser.parse_args()
    if given.rounds < 3:
        parser.error("--rounds must be at least 3")
    results: dict[str, Any] = {}
    for model in given.model or ["embedded"]:
        results[model] = {"modes": {}}
        for mode in MODES:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                run = Path(folder) / "run"
                config = run_config(model, given.method, given.rounds, run)
                results[model]["modes"][mode] = measure(mode, config)
        results[model]["alone"] = alone(config)
        if not given.json:
            _print_table(model, results[model])
    if given.json:
        project = tomllib.loads((APP / "pyproject.toml").read_text())["project"]
        facts = {
            "slora-flwr": project["version"],
            **{name: version(name) for name in ("flwr", "torch", "transformers")},
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "method": given.method,
            "rounds": given.rounds,
        }
        print(json.dumps({**facts, "results": results}, indent=2))


if __name__ == "__main__":
    main()
