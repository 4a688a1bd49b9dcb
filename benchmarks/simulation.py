"""A `flwr run` in simulation on a SuperLink of its own, watched from outside."""

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
# What each process of a simulation is, by a word of its command line. The ServerApp
# runs in the same process as Flower's simulation engine.
ROLES = {
    "flwr-simulation": "server",
    "flower-superlink": "superlink",
    "ClientAppActor": "worker",
}


@dataclass
class Watched:
    """A run's wall time in seconds, and the largest process of each role in bytes."""

    seconds: float
    bytes: dict[str, int]
    output: str


def simulate(app: Path, run_config: str, nodes: int, folder: Path) -> Watched:
    """Run an app with a worker for each core, and end all that it started.

    Parameters
    ----------
    app : Path
        The app's folder.
    run_config : str
        As `flwr run --run-config` takes it.
    nodes : int
        Flower nodes.
    folder : Path
        Empty; Flower's home and the run's go there.
    """
    home = folder / "flower"
    environment = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(_free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(_free_port()),
        "SLORA_HOME": str(folder / "slora"),
    }
    resources = f"num-supernodes={nodes} client-resources-num-cpus=1"
    command = [sys.executable, "-m", "flwr.cli.app", "run", str(app), "--stream"]
    command += ["--run-config", run_config, "--federation-config", resources]
    largest: dict[str, int] = {}
    begun = time.perf_counter()
    try:
        with (folder / "output").open("w+") as output:
            # Not in the checkout, whose code the actors would find before the bundle's.
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
            with suppress(psutil.NoSuchProcess):  # ended with the one before
                process.send_signal(signal.SIGKILL)


def round_ends(run: Path, clients: int) -> list[float]:
    """Read from a run directory when each round ended, in seconds.

    Rounds that some of their clients missed do not count.
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


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
