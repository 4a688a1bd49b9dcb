"""The Helm chart: its manifests, and its containers as processes of this machine."""

import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.processes import LONG

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "slora-flwr"
# Of the chart, each with the values of one way to install it.
CASES = sorted(path.stem for path in (CHART / "ci").glob("*-values.yaml"))
RELEASE, NAMESPACE = "fl", "learning"
# Where an image has its own files, or a pod its own volumes.
_OF_POD = {"app", "assets", "data", "dev", "home", "policy", "proc", "run", "state"}
_OF_POD |= {"sys", "tmp"}

Manifest = dict[str, Any]


def values_of(case: str) -> dict[str, Any]:
    return dict(yaml.safe_load((CHART / "ci" / f"{case}.yaml").read_text()))


def render(values: Mapping[str, Any]) -> tuple[list[Manifest], str]:
    """Return the manifests of a release with these values, and its notes."""
    import helm_python  # only where the extra `dev` is installed

    with helm_python.Chart.load(CHART) as chart:
        files = chart.render(dict(values), name=RELEASE, namespace=NAMESPACE)
    [notes] = [files.pop(name) for name in [*files] if name.endswith("NOTES.txt")]
    manifests = [m for text in files.values() for m in yaml.safe_load_all(text)]
    return [manifest for manifest in manifests if manifest], notes


def of_kind(manifests: list[Manifest], *kinds: str) -> dict[str, Manifest]:
    return {m["metadata"]["name"]: m for m in manifests if m["kind"] in kinds}


def pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Return the pods' templates by the name of what makes them."""
    found = of_kind(manifests, "StatefulSet", "Deployment")
    return {name: manifest["spec"]["template"] for name, manifest in found.items()}


def container(pod: Manifest) -> Manifest:
    """Return a pod's only container."""
    [only] = pod["spec"]["containers"]
    return dict(only)


def selected(manifests: list[Manifest], labels: Mapping[str, str]) -> list[str]:
    """Return the names of what makes pods with these labels."""
    return [
        name
        for name, pod in pods(manifests).items()
        if labels.items() <= pod["metadata"]["labels"].items()
    ]


def image_environment() -> dict[str, str]:
    """Return the environment that the Dockerfile sets."""
    text = (ROOT / "docker" / "Dockerfile").read_text().replace("\\\n", " ")
    [line] = re.findall(r"^ENV (.*)$", text, re.MULTILINE)
    return dict(pair.split("=", 1) for pair in line.split())


class Cluster:
    """Pods as processes.

    Each has the root file system, read-only, with the image's files, its volumes and
    nothing else of `/tmp`, `/run` and `/home`; the user of its manifest; an address on
    loopback, which stands for 0.0.0.0; and the names of the Services.

    Parameters
    ----------
    manifests
        Of a release.
    folder
        For the pods' volumes.
    contents
        Files of the Secrets, by name, and folders of the claims that pods bring.
    """

    def __init__(
        self,
        manifests: list[Manifest],
        folder: Path,
        contents: Mapping[str, Mapping[str, Path] | Path],
    ) -> None:
        self._folder, self._contents = folder, contents
        self.pods, self._maps = pods(manifests), of_kind(manifests, "ConfigMap")
        net = f"127.{random.randrange(1, 255)}.{random.randrange(255)}"
        self.addresses = {name: f"{net}.{i + 1}" for i, name in enumerate(self.pods)}
        self._hosts = {}
        for name, service in of_kind(manifests, "Service").items():
            [maker] = selected(manifests, service["spec"]["selector"])
            self._hosts[name] = self.addresses[maker]
        self.processes: dict[str, psutil.Popen] = {}
        app = folder / "app"
        app.mkdir(parents=True)
        for name in ("gate.py", "health.py"):
            shutil.copy(ROOT / "docker" / name, app)

    def start(self, name: str) -> None:
        """Start a pod, as often as it ended too."""
        command = container(self.pods[name])["command"]
        with (self._folder / f"{name}.log").open("ab") as log:
            self.processes[name] = psutil.Popen(
                self.inside(name, command), stdout=log, stderr=log
            )

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text()

    def inside(self, name: str, command: list[str]) -> list[str]:
        """Return what runs a command in a pod's container."""
        pod = self.pods[name]
        own = container(pod)
        environment = {
            **image_environment(),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            # The image has the package installed.
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            **{entry["name"]: entry["value"] for entry in own.get("env", [])},
        }
        if pod["spec"].get("enableServiceLinks", True):
            for service, address in self._hosts.items():
                prefix = service.upper().replace("-", "_")
                environment[f"{prefix}_SERVICE_HOST"] = address

        def expand(text: str) -> str:
            # As Kubernetes does: what is not set stays as it is.
            text = re.sub(r"\$\((\w+)\)", lambda m: environment.get(m[1], m[0]), text)
            return text.replace("0.0.0.0", self.addresses[name])

        user = pod["spec"]["securityContext"]
        arguments = [
            *("bwrap", "--die-with-parent", "--new-session", "--clearenv"),
            *("--unshare-user", "--unshare-pid", "--cap-drop", "ALL"),
            *("--uid", str(user["runAsUser"]), "--gid", str(user["runAsGroup"])),
            *_root(),
            *("--ro-bind", str(self._hosts_of(name)), "/etc/hosts"),
            *("--ro-bind", str(self._folder / "app"), "/app"),
            *("--proc", "/proc", "--dev", "/dev"),
        ]
        for mount in own["volumeMounts"]:
            bind = "--ro-bind" if mount.get("readOnly") else "--bind"
            source = self._volume(name, mount["name"]) / mount.get("subPath", "")
            arguments += [bind, str(source), mount["mountPath"]]
        arguments += ["--remount-ro", "/", "--chdir", "/app"]
        for key, value in environment.items():
            arguments += ["--setenv", key, expand(value)]
        return [*arguments, "--", *map(expand, command)]

    def probe(self, name: str, kind: str) -> bool:
        """Probe a pod's container as a kubelet does."""
        own = container(self.pods[name])
        [(how, what)] = [
            item
            for item in own[kind].items()
            if item[0] in ("httpGet", "grpc", "tcpSocket")
        ]
        numbers = {port["name"]: port["containerPort"] for port in own["ports"]}
        port = numbers.get(what["port"], what["port"])
        address = f"{self.addresses[name]}:{port}"
        if how == "grpc":
            with grpc.insecure_channel(address) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                try:
                    reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
                except grpc.RpcError:
                    return False
            return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)
        assert how == "httpGet"
        url = f"{what['scheme'].lower()}://{address}{what['path']}"
        try:
            # A kubelet does not check certificates.
            status = httpx.get(url, verify=False, timeout=10).status_code
        except httpx.TransportError:
            return False
        return 200 <= status < 400

    def close(self) -> None:
        """Kill all processes and their children."""
        left = []
        for process in self.processes.values():
            if process.is_running():
                left += [*process.children(recursive=True), process]
        for process in left:
            if process.is_running():
                process.kill()
        psutil.wait_procs(left, timeout=LONG)

    def state(self, name: str) -> Path:
        """Return the folder of a pod's own claim."""
        return self._volume(name, "state")

    def _volume(self, pod: str, name: str) -> Path:
        folder = self._folder / pod / name
        volumes = self.pods[pod]["spec"]["volumes"]
        given: Manifest = next(
            (volume for volume in volumes if volume["name"] == name), {}
        )
        if "persistentVolumeClaim" in given:
            source = self._contents[given["persistentVolumeClaim"]["claimName"]]
            assert isinstance(source, Path)
            return source
        if not folder.exists():
            folder.mkdir(parents=True)
            if "configMap" in given:
                for file, text in self._maps[given["configMap"]["name"]][
                    "data"
                ].items():
                    (folder / file).write_text(text)
            for source in given.get("projected", {}).get("sources", []):
                files = self._contents[source["secret"]["name"]]
                assert isinstance(files, Mapping)
                for item in source["secret"]["items"]:
                    shutil.copy(files[item["key"]], folder / item["path"])
        return folder

    def _hosts_of(self, name: str) -> Path:
        # In a pod, localhost is its own.
        lines = [f"{address} {host}\n" for host, address in self._hosts.items()]
        path = self._folder / f"{name}.hosts"
        path.write_text(f"{self.addresses[name]} localhost\n" + "".join(lines))
        return path


def _root() -> Iterator[str]:
    for path in sorted(Path("/").iterdir()):
        if path.name in _OF_POD:
            continue
        if path.is_symlink():
            yield from ("--symlink", str(path.readlink()), str(path))
        else:
            yield from ("--ro-bind", str(path), str(path))


def make_keys(folder: Path, names: list[str], nodes: list[str]) -> None:
    """Have `certs.sh` make a deployment's keys: in `certs`, and in `nodes`."""
    environment = {
        **os.environ,
        "SLORA_CERTS": str(folder / "certs"),
        "SLORA_NODES": str(folder / "nodes"),
        "SLORA_UID": str(os.getuid()),
    }
    for arguments in (["ca"], ["server", *names], ["node", *nodes]):
        script = ROOT / "docker" / "certs.sh"
        subprocess.run([script, *arguments], env=environment, check=True)
