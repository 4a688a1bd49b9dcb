"""Real `flwr run` in simulation: Ray, a SuperLink of the test's own, the app bundle."""

import json
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.common.config import flatten_dict
from safetensors.torch import load_file

from slora_flwr.engines.inline import InlineGrid
from slora_flwr.server.run import run
from tests.support.own_data import KINDS, texts, write
from tests.support.simulation import flower_home

ROOT = Path(__file__).parents[2]
VALUES: dict[str, Any] = {
    "rounds": 2,
    "sparse.rounds": 1,
    "clients.per-round": 3,
    "data.max-test": 100,
    "train.batch-size": 32,
}
CODED: dict[str, Any] = {
    "rounds": 3,
    # Few clients, so that some train again on the residuals they left.
    "clients.count": 4,
    "clients.partitioner": "'virtual'",
    "data.max-length": 16,
    "upload.dtype": "'int4'",
    "upload.top-k": 0.1,
    "upload.lossless": "true",
    "download.dtype": "'int8'",
    "download.lossless": "true",
}


# How the lines begin that the app logs in a run of a round on nodes' data.
OURS = (
    "slora-flwr ",
    "model.name is embedded",
    "computing in float32",
    "3 labels agreed",
    "node ",
    "2 nodes host 2 clients",
    "lora: ",
    "round 1/1 ",
)


@pytest.fixture(scope="module")
def flower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Return an environment with its own SuperLink, and end what was started in it."""
    with flower_home(tmp_path_factory.mktemp("flower")) as environment:
        yield environment


SECURE: dict[str, Any] = {
    "secure.aggregation": "true",
    "secure.clip": 2.0,
    "upload.dtype": "'int8'",
    "clients.max-weight": 100,
    "clients.min-nodes": 2,
    "clients.min-replies": 2,
}


def slora(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [Path(sys.executable).parent / "slora", "run", str(ROOT), *arguments],
        env=environment,
        # The SuperLink keeps the folder it is started in on the actors' sys.path; in
        # the checkout they would run its code instead of the bundle's.
        cwd=environment["FLWR_HOME"],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(CODED, id="coded"),
        pytest.param(SECURE, id="secure", marks=pytest.mark.sockets),
    ],
)
def test_a_simulation_gives_the_inline_engines_figures(
    flower: dict[str, str], tmp_path: Path, changes: dict[str, Any]
) -> None:
    given = VALUES | changes | {"run.dir": f"'{tmp_path}/ray'"}
    written = " ".join(f"{key}={value}" for key, value in given.items())
    done = slora(flower, "--nodes", "2", "--verbose", "-c", written)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No additional application dependencies needed" in done.stdout
    assert "fft, same rounds" in done.stdout
    made_by = tomllib.loads((tmp_path / "ray" / "resolved.toml").read_text())["engine"]
    assert made_by == {"name": "flwr", "nodes": 2}

    read = tomllib.loads(written.replace(" ", "\n"))
    values = flatten_dict(read) | {"run.dir": str(tmp_path / "inline")}
    run(InlineGrid(values, nodes=2, run_id=2), values, run_id=2)
    for name in ("last", "averaged", "best"):
        states = [
            load_file(tmp_path / engine / "checkpoints" / f"{name}.safetensors")
            for engine in ("ray", "inline")
        ]
        assert states[0].keys() == states[1].keys()
        for key, tensor in states[0].items():
            assert torch.equal(tensor, states[1][key]), key
    summaries = [
        json.loads((tmp_path / engine / "summary.json").read_text())
        for engine in ("ray", "inline")
    ]
    figures = ("accuracy", "macro_f1", "loss", "payload_bytes_up", "payload_bytes_down")
    for key in figures:
        assert summaries[0][key] == pytest.approx(summaries[1][key], abs=1e-6)


def test_a_simulated_node_opens_the_files_that_a_run_names(
    flower: dict[str, str], tmp_path: Path
) -> None:
    for node in range(2):
        write(tmp_path / f"node-{node}.csv", texts(node, 40, KINDS))
    given: dict[str, Any] = {"data.name": "'node'"}
    given |= {"data.train": f"'{tmp_path}/node-{{}}.csv'"}
    given |= {"clients.count": 0, "clients.per-round": 2, "clients.holdout": 0.2}
    given |= {"method": "'lora'", "rounds": 1, "run.dir": f"'{tmp_path}/run'"}
    written = " ".join(f"{key}={value}" for key, value in given.items())
    done = slora(flower, "--nodes", "2", "-c", written)
    assert done.returncode == 0, done.stdout + done.stderr
    first, *lines = done.stdout.splitlines()
    assert first.startswith("Run ")
    for line in lines[: lines.index(next(x for x in lines if x.startswith("┏")))]:
        # Ours, and nothing of Flower's or Ray's start.
        told = line.removeprefix("INFO :      ").removeprefix("WARNING :   ")
        assert told.startswith(OURS), done.stdout
    assert "ClientAppActor" not in done.stdout
    for node in range(2):
        assert f"INFO :      node {node} is client {node}: 40 examples" in done.stdout
    assert not done.stderr
    assert "\x1b" not in done.stdout  # it is no terminal
    classes = (tmp_path / "run" / "adapter" / "classes.json").read_text()
    assert json.loads(classes) == KINDS


def test_a_failed_run_has_a_failed_exit_status(flower: dict[str, str]) -> None:
    done = slora(flower, "-c", "data.name='/nowhere'")
    assert done.returncode == 1
    assert "data.name is '/nowhere'; allowed:" in done.stdout
    assert "finished:failed" in done.stderr


def test_the_bundle_holds_the_code_and_asks_for_no_installation(
    tmp_path: Path,
) -> None:
    from flwr.cli.build import build_fab_from_disk

    fab = build_fab_from_disk(ROOT)
    (tmp_path / "app.fab").write_bytes(fab)
    with zipfile.ZipFile(tmp_path / "app.fab") as bundle:
        names = set(bundle.namelist())
        project = tomllib.loads(bundle.read("pyproject.toml").decode())
    source = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("slora_flwr/**/*.py")}
    assert source | {"server_app.py", "client_app.py"} <= names
    # uv would read it instead of the metadata below, and install torch again.
    assert "uv.toml" not in names
    assert not any(name.startswith(("tests", "slora_embedded")) for name in names)
    assert project["tool"]["uv"] == {
        "dependency-metadata": [
            {"name": project["project"]["name"], "version": "0", "requires-dist": []}
        ]
    }
    # Stored as it is, with a README, a licence and the bundle's own tables.
    code = sum((ROOT / name).stat().st_size for name in source)
    assert code < len(fab) < code + 100_000
