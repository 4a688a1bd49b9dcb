"""A run on a Ray cluster of two machines that loses a worker, then one of the machines.

The machines are two network namespaces with a cable between them. The second has an
empty disk in place of the folders in which the first keeps the app's bundle and caches.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from slora_flwr.engines.inline import InlineGrid
from slora_flwr.server.run import run
from tests.support.processes import wait_until

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
VALUES: dict[str, Any] = {
    "rounds": 9,
    "sparse.rounds": 3,
    "clients.per-round": 4,
    "data.max-test": 100,
    "train.batch-size": 32,
}
PORT = 6379


def ip(*arguments: str) -> str:
    done = subprocess.run(
        ["ip", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Machine:
    """A network namespace."""

    name: str
    address: str
    environment: dict[str, str]

    def start(self, command: str, log: Path) -> subprocess.Popen:
        with log.open("ab") as out:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, "sh", "-ec", command],
                env=self.environment,
                # Not the checkout: see test_flower.py.
                cwd=log.parent,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def processes(self) -> dict[int, str]:
        """Return the names of the processes by their ids."""
        found = {}
        for pid in map(int, ip("netns", "pids", self.name).split()):
            try:
                found[pid] = " ".join(psutil.Process(pid).cmdline()).strip()
            except psutil.Error:  # it has ended
                continue
        return found

    def busy(self) -> list[int]:
        """Return the workers that are in the middle of a message."""
        wanted = "ray::ClientAppActor.run"
        return [pid for pid, name in self.processes().items() if name == wanted]

    def kill(self) -> None:
        while found := self.processes():
            for pid in found:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.1)


@dataclass
class Cluster:
    """Two machines, and the folder of what the first keeps."""

    folder: Path
    first: Machine
    second: Machine

    def start(self) -> None:
        """Start Ray on both; the second has an empty disk at the folder."""
        log = self.folder / "first.log"
        self.first.start(
            f"exec {BIN}/ray start --head --block --num-cpus 1 --port {PORT}"
            f" --node-ip-address {self.first.address} --temp-dir {self.folder}/ray"
            " --include-dashboard false --disable-usage-stats",
            log,
        )
        self._wait(log)
        log = self.folder / "second.log"
        self.second.start(
            f"mount -t tmpfs none {self.folder} && exec {BIN}/ray start --block"
            f" --address {self.first.address}:{PORT} --num-cpus 1"
            f" --node-ip-address {self.second.address} --disable-usage-stats",
            log,
        )
        self._wait(log)

    def _wait(self, log: Path) -> None:
        wait_until(lambda: "Ray runtime started" in log.read_text())


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Not pytest's folder: its path is too long for Ray's sockets.
    folder = Path(tempfile.mkdtemp(prefix="slora-"))
    names = [f"slora-{os.getpid()}-{i}" for i in (1, 2)]
    addresses = "10.213.0.1", "10.213.0.2"
    cables = [f"sl{os.getpid()}-{i}" for i in (1, 2)]
    environment = {
        **os.environ,
        "FLWR_HOME": str(folder / "flower"),
        # The namespaces have ports of their own.
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": "39091",
        "FLWR_LOCAL_CONTROL_API_PORT": "39093",
        "SLORA_HOME": str(folder / "slora"),
        "RAY_ADDRESS": f"{addresses[0]}:{PORT}",
    }
    environment.pop("PYTHONPATH", None)
    machines = [
        Machine(name, address, environment)
        for name, address in zip(names, addresses, strict=True)
    ]
    made: list[Machine] = []
    try:
        try:
            for machine in machines:
                ip("netns", "add", machine.name)
                made.append(machine)
            ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
            for machine, cable in zip(machines, cables, strict=True):
                ip("link", "set", cable, "netns", machine.name)
                ip(
                    "-n",
                    machine.name,
                    "addr",
                    "add",
                    f"{machine.address}/24",
                    "dev",
                    cable,
                )
                ip("-n", machine.name, "link", "set", cable, "up")
                ip("-n", machine.name, "link", "set", "lo", "up")
        except OSError as error:
            pytest.skip(f"no network namespaces here: {error}")
        cluster = Cluster(folder, *machines)
        cluster.start()
        yield cluster
    finally:
        for machine in made:
            machine.kill()
            ip("netns", "del", machine.name)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run directory of the same run in one process."""
    folder = tmp_path_factory.mktemp("inline")
    values = {**VALUES, "run.dir": str(folder)}
    run(InlineGrid(values, nodes=2), values, run_id=1)
    return folder


def events(folder: Path) -> list[dict[str, Any]]:
    path = folder / "events.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def follow(
    cluster: Cluster, folder: Path, losses: dict[int, Callable[[int], None]]
) -> tuple[set[str], str]:
    """Run, and lose something while the second machine works, after so many rounds.

    Returns
    -------
    set of str
        The addresses of the machines that worked.
    str
        The output of the run.
    """
    values = {**VALUES, "run.dir": f"'{folder}'"}
    config = " ".join(f"{key}={value}" for key, value in values.items())
    log = cluster.folder / f"{folder.name}.log"
    started = cluster.first.start(
        f'exec nice {BIN}/slora run {ROOT} --nodes 2 -c "{config}"', log
    )
    worked: set[str] = set()
    losses = dict(losses)
    while started.poll() is None:
        busy = {m.address: m.busy() for m in (cluster.first, cluster.second)}
        worked |= {address for address, workers in busy.items() if workers}
        rounds = sum(event["event"] == "round" for event in events(folder))
        victims = busy[cluster.second.address]
        due = [after for after in losses if rounds >= after]
        if due and victims:
            losses.pop(due[0])(victims[0])
        time.sleep(0.1)
    assert not losses
    assert started.returncode == 0, log.read_text()[-5000:]
    return worked, log.read_text()


def test_losses_in_mid_round_change_no_bit(
    cluster: Cluster, expected: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    worked, output = follow(
        cluster,
        folder,
        {
            1: lambda worker: os.kill(worker, signal.SIGKILL),
            3: lambda worker: cluster.second.kill(),
        },
    )
    assert worked == {cluster.first.address, cluster.second.address}
    assert output.count("A Ray worker is lost") == 2, output[-5000:]
    assert not [event for event in events(folder) if event["event"] == "failure"]
    for name in ("last", "averaged", "best", "base"):
        state, wanted = (
            load_file(path / "checkpoints" / f"{name}.safetensors")
            for path in (folder, expected)
        )
        assert state.keys() == wanted.keys()
        for key, tensor in state.items():
            assert torch.equal(tensor, wanted[key]), key
