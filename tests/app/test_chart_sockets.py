"""The chart's own containers, flags, users, secrets and probes, in a whole run."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.support.chart import ROOT, Cluster, make_keys, render
from tests.support.processes import LONG, wait_until

pytest.importorskip("helm_python", reason="Helm's engine is in the extra `dev`")
pytestmark = pytest.mark.sockets

TOOLS = Path(sys.executable).parent


def test_a_run_of_the_rendered_containers(
    tmp_path: Path, corpus: Path, tiny_models: dict[str, Path]
) -> None:
    if not shutil.which("bwrap"):
        pytest.skip("a pod's file system takes bubblewrap")
    certs = tmp_path / "certs"
    server = ("ca.crt", "server.crt", "server.key", "superexec")
    contents: dict[str, Path | dict[str, Path]] = {
        "slora-server": {name: certs / name for name in server}
    }
    header, *rows = corpus.read_text().splitlines()
    parts = {"test": rows[:40], "a": rows[40:100], "b": rows[100:]}
    for name, part in parts.items():
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        (folder / f"{name}.csv").write_text("\n".join([header, *part]) + "\n")
        contents[f"data-{name}"] = folder
    contents["models"] = tmp_path / "assets"
    shutil.copytree(tiny_models["bert"], tmp_path / "assets" / "models" / "bert")
    for name in ("a", "b"):
        key = tmp_path / "nodes" / name / "key"
        contents[name] = {"ca.crt": certs / "ca.crt", "key": key}

    def claim(name: str) -> dict[str, dict[str, str]]:
        return {"persistentVolumeClaim": {"claimName": name}}

    columns = {"data-text": "text", "data-label": "label"}
    manifests, notes = render(
        {
            "serverapp": {"data": claim("data-test"), "assets": claim("models")},
            "clientapp": {"assets": claim("models")},
            "nodes": [
                {
                    "name": name,
                    "secret": name,
                    "data": claim(f"data-{name}"),
                    "config": columns,
                }
                for name in ("a", "b")
            ],
        }
    )
    cluster = Cluster(manifests, tmp_path / "pods", contents)
    # The address for `flwr run` of this test; of a real one the port is forwarded.
    names = ["fl-superlink", "fl-gate", cluster.addresses["fl-superlink"]]
    make_keys(tmp_path, names, ["a", "b"])
    try:
        run(cluster, notes, tmp_path)
    finally:
        cluster.close()


def run(cluster: Cluster, notes: str, tmp_path: Path) -> None:
    cluster.start("fl-superlink")
    assert not cluster.probe("fl-gate", "readinessProbe")
    wait_until(lambda: cluster.probe("fl-superlink", "startupProbe"))
    cluster.start("fl-gate")
    wait_until(lambda: cluster.probe("fl-gate", "readinessProbe"))

    # A node that is not registered is refused and ends: Kubernetes starts it again.
    cluster.start("fl-node-a")
    cluster.processes["fl-node-a"].wait(LONG)
    assert "[code: 2004]" in cluster.log("fl-node-a")

    [line] = [line for line in notes.splitlines() if "supernode register" in line]
    [*command, less, _] = shlex.split(line.partition(" -- ")[2])
    assert (command[-1], less) == ("NAME", "<")
    for name in ("a", "b"):
        done = subprocess.run(
            cluster.inside("fl-superlink", [*command[:-1], name]),
            input=(tmp_path / "nodes" / name / "key.pub").read_bytes(),
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, (done.stdout + done.stderr).decode()
    for part in ("node-a", "app-a", "node-b", "app-b", "serverapp"):
        cluster.start(f"fl-{part}")
    for name in cluster.pods:
        for kind in ("startupProbe", "readinessProbe"):
            if kind in cluster.pods[name]["spec"]["containers"][0]:
                wait_until(partial(cluster.probe, name, kind))

    flower = tmp_path / "flower"
    flower.mkdir()
    address = cluster.addresses["fl-superlink"]
    (flower / "config.toml").write_text(
        f'[superlink.here]\naddress = "{address}:8000"\n'
        f'root-certificates = "{tmp_path / "certs" / "ca.crt"}"\n'
    )
    config = {
        "method": "lora",
        "rounds": 2,
        "model.name": "/assets/models/bert",
        "data.name": "node",
        "data.test": "/data/test.csv",
        "data.max-length": 12,
        "clients.count": 0,
        "clients.per-round": 2,
        "clients.min-nodes": 2,
        "clients.min-replies": 2,
        "lora.rank": 4,
    }
    text = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    started = subprocess.run(
        [TOOLS / "flwr", "run", ROOT, "here", "--stream", "--run-config", text],
        cwd=tmp_path,
        env={**os.environ, "FLWR_HOME": str(flower)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert started.returncode == 0, started.stdout + started.stderr
    [summary] = (cluster.state("fl-serverapp") / "runs").glob("*/summary.json")
    assert summary.with_name("adapter").is_dir()
    events = summary.with_name("events.jsonl").read_text().splitlines()
    rounds = [event for event in map(json.loads, events) if event["event"] == "round"]
    assert [event["replied"] for event in rounds] == [2, 2]
    # None of them has ended or stopped answering meanwhile.
    for name, process in cluster.processes.items():
        assert process.poll() is None, cluster.log(name)
        if name != "fl-gate":
            assert cluster.probe(name, "livenessProbe")
