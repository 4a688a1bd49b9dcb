"""A deployment whose nodes are hostile, except one."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.deployment import Deployment, Run
from tests.support.own_data import make_own_data_config, nodes_of
from tests.support.processes import LONG
from tests.support.runs import Config

pytestmark = pytest.mark.sockets

MEGABYTE = 2**20


@pytest.fixture
def config(tmp_path: Path, tiny_models: dict[str, Path]) -> Config:
    config = make_own_data_config(tmp_path, tiny_models["bert"])
    config |= {"method": "lora", "rounds": 5, "clients.deadline": LONG}
    return config | {"clients.min-replies": 1}


@pytest.fixture
def deployment(config: Config, tmp_path: Path) -> Iterator[Deployment]:
    columns = 'data-text="text" data-label="label" allowed-folders="/"'
    deployment = Deployment(
        [
            f'name="{name}" data-path="{path}" {columns}'
            for name, path in nodes_of(tmp_path).items()
        ]
    )
    try:
        deployment.start()
        yield deployment
    finally:
        deployment.close()


def finish(deployment: Deployment, run: Run) -> None:
    run.stream.wait(LONG)
    assert deployment.status(run) == "finished:completed"


def peak_bytes(process: psutil.Process) -> int:
    """Return the largest resident size that a process has had."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def test_an_honest_node_ends_its_run_beside_hostile_ones(
    deployment: Deployment, config: Config, tmp_path: Path
) -> None:
    honest, first, second = deployment.nodes
    honest.err({3: "waits", 5: "waits"})
    first.err({1: "no-protobuf", 2: "other-root", 3: "empty"})
    second.err({3: "repeated-chunk"})
    run = deployment.run(config)
    honest.wait_until_it_trains(run, 3)
    before = peak_bytes(deployment.serverapp())
    honest.err({5: "waits"})
    honest.wait_until_it_trains(run, 5)
    grown = peak_bytes(deployment.serverapp()) - before
    honest.err({})
    finish(deployment, run)
    # The array would have 600 MB.
    assert grown < 150 * MEGABYTE
    names = {event["node"]: event["name"] for event in run.events("node")}
    found = {
        (event["round"], names[event["node"]]): event["reason"]
        for event in run.events("failure")
    }
    told = {
        (1, "b"): "DecodeError: ",
        (2, "b"): "AttributeError: 'RecordDict' object has no attribute 'metadata'",
        (3, "b"): "IndexError: ",
        (3, "c"): "its arrays have 629145600 bytes; allowed: up to ",
    }
    assert found.keys() == told.keys()
    assert all(reason in found[key] for key, reason in told.items())
    [left_out] = run.events("left_out")
    assert left_out["name"].startswith("b (node ")
    assert "not asked again in this run" in left_out["reason"]
    trained = [sorted(event["clients"]) for event in run.events("round")]
    assert trained == [["0", "2"], ["0", "2"], ["0"], ["0", "2"], ["0", "2"]]

    first.err({"query": "hidden-label"})
    second.err({"query": "many-labels"})
    run = deployment.run(config | {"run.dir": str(tmp_path / "second")})
    finish(deployment, run)
    reasons = {names[e["node"]]: e["reason"] for e in run.events("left_out")}
    assert "allowed: labels without control and invisible" in reasons["b"]
    assert "it has 1000 labels, the most of all" in reasons["c"]
    assert [e["name"] for e in run.events("node")] == ["a"]
    assert [sorted(e["clients"]) for e in run.events("round")] == [["0"]] * 5
    written = [path.read_bytes() for path in deployment.logs()]
    assert not any(b"\x1b[2J" in log or "\u202e".encode() in log for log in written)
    pages = [*(tmp_path / "second").glob("*.*")]
    assert not any("\u202e".encode() in path.read_bytes() for path in pages)
