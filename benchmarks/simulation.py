"""A `flwr run` in simulation on its own SuperLink, observed from outside."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

APP = Path(__file__).parents[1]
# The role of each process of a simulation, by a word of its command line. The ServerApp
# runs in the same process as Flower's simulation engine.
ROLES = {
    "flwr-simulation": "server",
    "flower-superlink": "superlink",
    "ClientAppActor": "worker",
}


@dataclass
class Watched:
    """A run's wall time, the largest process of each role in bytes, and its output."""

    seconds: float
    bytes: dict[str, int]
    output: str


def simulate(app: Path, run_config: str, nodes: int, folder: Path) -> Watched:
    """Run an app with one worker per core, and end all processes that it started.

    Parameters
    ----------
    app : Path
        The app's folder.
    run_config : str
        Argument of `flwr run --run-config`.
    nodes : int
        Number of Flower nodes.
    folder : Path
        An empty folder for Flower's home and the run's.
    """
    home = folder / "flower"
    http, control = free_ports(2)
    environment = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(http),
        "FLWR_LOCAL_CONTROL_API_PORT": str(control),
        "SLORA_HOME": str(folder / "slora"),
    }
    resources = f"num-supernodes={nodes} client-resources-num-cpus=1"
    command = [sys.executable, "-m", "flwr.cli.app", "run", str(app), "--stream"]
    command += ["--run-config", run_config, "--federation-config", resources]
    largest: dict[str, int] = {}
    begun = time.perf_counter()
    try:
        with (folder / "output").open("w+") as output:
            # Outside the checkout, or actors would import its code, not the bundle's.
            child = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            while child.poll() is None:
                for role, size in _sizes(home):
                    largest[role] = max(size, largest.get(role, 0))
                time.sleep(1)
            seconds = time.perf_counter() - begun
            output.seek(0)
            return Watched(seconds, largest, output.read())
    finally:
        for process in _processes(home):
            with suppress(psutil.NoSuchProcess):  # ended with an earlier one
                process.send_signal(signal.SIGKILL)


def round_ends(run: Path, clients: int) -> list[float]:
    """Return the seconds at which each round ended, read from a run directory.

    Rounds with missing replies are omitted.
    """
    path = run / "events.jsonl"
    events = map(json.loads, path.read_text().splitlines() if path.exists() else ())
    rounds = (event for event in events if event["event"] == "round")
    return [event["seconds"] for event in rounds if event["replied"] == clients]


def _processes(home: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME") == str(home):
                yield process
        except psutil.Error:  # gone, or another user's
            continue


def _sizes(home: Path) -> Iterator[tuple[str, int]]:
    for process in _processes(home):
        try:
            line = " ".join(process.cmdline())
            size = process.memory_info().rss
        except psutil.Error:
            continue
        for word, role in ROLES.items():
            if word in line:
                yield role, size


def free_ports(count: int) -> list[int]:
    """Return distinct free ports of this machine."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports
