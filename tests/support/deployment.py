"""A deployment on loopback: real processes, which tests kill, stop and start again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import psutil

from slora_flwr.common.files import write_atomically
from tests.support.processes import LONG, free_port, is_open, residents, wait_until
from tests.support.runs import Config

ROOT = Path(__file__).parents[2]
FAULTS = Path(__file__).parent / "faults"
STAND_INS = Path(__file__).parent / "stand_ins"
TOOLS = Path(sys.executable).parent
PARTITIONS = [
    f'partition-id={index} num-partitions=2 allowed-folders="/"' for index in range(2)
]


@dataclass
class Run:
    """A run started by `flwr run --stream`."""

    run_id: int
    directory: Path
    stream: subprocess.Popen[bytes]

    def rounds(self) -> list[int]:
        """Return the rounds that have ended."""
        return [event["round"] for event in self.events("round")]

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self.directory / "events.jsonl"
        # The last line may be incomplete.
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def wait_for_round(self, number: int) -> None:
        """Wait until a round has ended."""
        wait_until(lambda: number in self.rounds())


class Node:
    """A SuperNode with its own folders, like a separate machine.

    Its processes commit the faults in the file `faults` and record what they do; see
    `faults/sitecustomize.py`.

    Parameters
    ----------
    folder : Path
        Where it keeps what it has.
    link : int
        The SuperLink's port.
    config : str
        Its node config.
    security : Sequence[str]
        The options of its connection.
    """

    def __init__(
        self,
        folder: Path,
        link: int,
        config: str,
        security: Sequence[str] = ("--insecure",),
    ) -> None:
        self.folder, self._link, self._config = folder, link, config
        self._security = security
        folder.mkdir()
        self.faults = folder / "faults.json"
        self._done = folder / "done"
        self._done.touch()
        self.err({})
        self.start()

    def start(self) -> None:
        environment = {
            **_environment(self.folder),
            "SLORA_TEST_FAULTS": str(self.faults),
            "SLORA_TEST_DONE": str(self._done),
        }
        with (self.folder / "log").open("ab") as log:
            self.process = psutil.Popen(
                [
                    *(sys.executable, "-m", "slora_flwr.client.supernode"),
                    *(*self._security, "--superlink", f"127.0.0.1:{self._link}"),
                    *("--port", str(free_port()), "--poll-seconds", "0.2"),
                    *("--node-config", self._config),
                ],
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        """Kill all its processes, as a power failure would."""
        # Stopped first, so that none starts another meanwhile.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            self.signal(number)
        self.process.wait()

    def signal(self, number: int) -> None:
        """Send a signal to all its processes."""
        for process in self.processes():
            process.send_signal(number)

    def err(self, faults: Mapping[int, str] | Mapping[str, str]) -> None:
        """Set the fault that it commits in each round, or in a "query"."""
        # Atomically, since its processes read the file while they wait.
        write_atomically(self.faults, json.dumps(faults).encode())

    def processes(self) -> list[psutil.Process]:
        """Return its processes, from the SuperNode down."""
        return [*_family(self.process), *residents(self.folder)]

    def count(self, run: Run, done: str) -> int:
        """Return how often it did something in a run, such as "sends train 2"."""
        wanted = [str(run.run_id), *done.split()]
        lines = [line.split() for line in self._done.read_text().splitlines()]
        return sum(line[: len(wanted)] == wanted for line in lines)

    def wait_until_it_trains(self, run: Run, number: int) -> None:
        """Wait until it has received a round's message, and waits there."""
        wait_until(lambda: self.count(run, f"waits {number}") > 0)

    def wait_until_it_sends(self, run: Run, number: int, times: int = 1) -> None:
        """Wait until the SuperLink has its reply of a round."""
        wait_until(lambda: self.count(run, f"sends train {number}") >= times)


class Deployment:
    """A SuperLink with a database, and SuperNodes of given configs.

    The SuperLink starts the ServerApps' processes. If it is `separate`, a SuperExec
    beside it does, as in the compose files.

    Parameters
    ----------
    configs : Sequence[str]
        The nodes' configs.
    registered : Sequence[str]
        If given, it has TLS, and `docker/certs.sh` registers the nodes' keys under
        these names.
    """

    def __init__(
        self, configs: Sequence[str] = PARTITIONS, registered: Sequence[str] = ()
    ) -> None:
        # Not pytest's folder, which is too long for the path of a Unix socket.
        self.folder = Path(tempfile.mkdtemp(prefix="slora-"))
        self._link = free_port()
        # While this file exists, ServerApps' deadlines have passed.
        self.late = self.folder / "late"
        self._environment = {
            **_environment(self.folder / "server"),
            "SLORA_TEST_LATE": str(self.late),
        }
        flower = Path(self._environment["FLWR_HOME"])
        flower.mkdir(parents=True)
        self._registered, self._certs = registered, self.folder / "certs"
        security = f'root-certificates = "{self._certs / "ca.crt"}"'
        (flower / "config.toml").write_text(
            f'[superlink.local]\naddress = "127.0.0.1:{self._link}"\n'
            f"{security if registered else 'insecure = true'}\n"
        )
        self._started: list[psutil.Popen] = []
        self._runs = 0
        self.superexec: psutil.Popen | None = None
        self._configs = configs
        self.nodes: list[Node] = []

    def start(self) -> None:
        if self._registered:
            self._run_certs("ca")
            self._run_certs("server", "127.0.0.1")
            self._run_certs("node", *self._registered)
        self.start_superlink()
        if self._registered:
            self._run_certs("register", *self._registered)
        ca = ("--root-certificates", str(self._certs / "ca.crt"))
        keys = [self._certs / name / "key" for name in self._registered]
        secured = [(*ca, "--auth-supernode-private-key", str(key)) for key in keys]
        for index, (config, security) in enumerate(
            zip(self._configs, secured or repeat(("--insecure",)), strict=False)
        ):
            folder = self.folder / f"{index}"
            self.nodes.append(Node(folder, self._link, config, security))

    def start_superlink(self, *, separate: bool = False) -> None:
        """Start the SuperLink on its database, which survives a restart."""
        database = self.folder / "server" / "database"
        security: list[str | Path] = ["--insecure"]
        if self._registered:
            security = ["--enable-supernode-auth"]
            for option, file in (
                ("--ssl-ca-certfile", "ca.crt"),
                ("--ssl-certfile", "server.crt"),
                ("--ssl-keyfile", "server.key"),
            ):
                security += [option, self._certs / file]
        self.superlink = self._start(
            *(TOOLS / "flower-superlink", *security, "--port", self._link),
            *("--database", database),
            *("--isolation", "process" if separate else "subprocess"),
        )
        if separate and self.superexec is None:
            address = f"127.0.0.1:{self._link}"
            self.superexec = self._start(
                *(TOOLS / "flower-superexec", "--insecure"),
                *("--runtime-api-address", address),
            )
        wait_until(lambda: is_open(self._link))

    def kill_superlink(self) -> None:
        self.superlink.kill()
        self.superlink.wait()

    def run(self, config: Config) -> Run:
        """Start a run; return it once Flower has given it an id."""
        text = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        self._runs += 1
        log = self.folder / "server" / f"run-{self._runs}"
        command = (TOOLS / "flwr", "run", ROOT, "local", "--stream", "--run-config")
        stream = self._start(*command, text, log=log)
        said = "Successfully started run "
        wait_until(lambda: said in log.read_text())
        run_id = log.read_text().partition(said)[2].split()[0]
        directory = str(config.get("run.resume") or config["run.dir"])
        return Run(int(run_id), Path(directory), stream)

    def status(self, run: Run) -> str:
        """Return a run's status according to Flower."""
        told = self._ask("list", "local", "--run-id", str(run.run_id))
        return str(told["runs"][0]["status"])

    def online(self) -> int:
        """Return the number of SuperNodes online according to Flower."""
        told = self._ask("supernode", "list", "local")
        return sum(node["status"] == "online" for node in told["nodes"])

    def serverapps(self) -> list[psutil.Process]:
        """Return the processes in which ServerApps run."""
        launchers = [self.superlink, *filter(None, [self.superexec])]
        found = [p for launcher in launchers for p in _family(launcher)]
        return [p for p in found if _is_called("flwr-serverapp", p)]

    def serverapp(self) -> psutil.Process:
        """Return the one ServerApp's process, once those of earlier runs have ended."""
        wait_until(lambda: len(self.serverapps()) == 1)
        [process] = self.serverapps()
        return process

    def kill_serverapp(self, run: Run) -> None:
        """Kill a run's ServerApp and the process that streams its log."""
        self.serverapp().kill()
        run.stream.kill()
        run.stream.wait()

    def logs(self) -> list[Path]:
        """Return the files with what the server and its runs printed."""
        folder = self.folder / "server"
        return [folder / "log", *folder.glob("run-*")]

    def close(self) -> None:
        """Kill all processes and their children, and delete the folder."""
        left = [p for process in self._started for p in _family(process)]
        left += [p for node in self.nodes for p in node.processes()]
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=LONG)
        shutil.rmtree(self.folder)

    def _run_certs(self, *arguments: str) -> None:
        """Run `docker/certs.sh`, for which all is in one container: this machine."""
        environment = {
            **self._environment,
            "PATH": f"{STAND_INS}{os.pathsep}{self._environment['PATH']}",
            "SLORA_CERTS": str(self._certs),
            "SLORA_NODES": str(self._certs),
        }
        script = ROOT / "docker" / "certs.sh"
        subprocess.run([script, *arguments], env=environment, check=True)

    def _ask(self, *command: str) -> dict[str, Any]:
        done = subprocess.run(
            [TOOLS / "flwr", *command, "--format", "json"],
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            check=True,
        )
        return dict(json.loads(done.stdout))

    def _start(self, *command: str | int | Path, log: Path | None = None) -> Any:
        path = log or self.folder / "server" / "log"
        with path.open("ab") as file:
            process = psutil.Popen(
                [*map(str, command)],
                # Not in the checkout, whose code would shadow the bundle's.
                cwd=self.folder,
                env=self._environment,
                stdout=file,
                stderr=file,
            )
        self._started.append(process)
        return process


def _environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        # Flower finds the commands that it starts here.
        "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_HOME": str(folder / "flower"),
        "PYTHONPATH": os.pathsep.join([str(FAULTS), *_python_path()]),
        "SLORA_HOME": str(folder / "home"),
        "TMPDIR": str(folder),
    }


def _python_path() -> list[str]:
    return [*filter(None, [os.environ.get("PYTHONPATH")])]


def _family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _is_called(name: str, process: psutil.Process) -> bool:
    try:
        return any(Path(part).name == name for part in process.cmdline())
    except psutil.NoSuchProcess:
        return False
