"""Flower's simulation, started by `flwr run` and followed to the run's end."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from slora_flwr.config import ConfigError

_FLWR = (sys.executable, "-m", "flwr.cli.app")


class FlowerError(RuntimeError):
    """Flower did not start a run, or the run did not complete."""


def run_flower(
    folder: Path, run_config: Sequence[str], nodes: int | None = None
) -> None:
    """Run the app in Flower's simulation on Ray, and wait until the run ends.

    Parameters
    ----------
    folder : Path
        Folder of the app.
    run_config : Sequence[str]
        Arguments of `flwr run --run-config`.
    nodes : int or None
        Number of simulated nodes; None for one per GPU or, without GPUs, per core.

    Raises
    ------
    ConfigError
        If the folder holds no app.
    FlowerError
        If the run does not start or does not complete.
    """
    if not (folder / "pyproject.toml").is_file():
        raise ConfigError(
            f"{folder.absolute()} holds no Flower app; allowed: a checkout of "
            "slora-flwr, or --engine inline"
        )
    command = ["run", str(folder), "--format", "json"]
    for value in run_config:
        command += ["--run-config", value]
    gpus = torch.cuda.device_count()
    nodes = nodes or gpus or os.cpu_count() or 1
    # Ray assigns a fraction of one GPU, or whole GPUs.
    share = min(1.0, gpus / nodes)
    resources = f"client-resources-num-cpus=1 client-resources-num-gpus={share}"
    command += ["--federation-config", f"num-supernodes={nodes} {resources}"]
    run_id = str(_flwr(*command)["run-id"])
    streamed = subprocess.run([*_FLWR, "log", run_id, "--stream"], check=False)
    listed = _flwr("list", "--run-id", run_id, "--format", "json")
    status = listed["runs"][0]["status"]
    # `flwr log` exits with 0 even if the run failed.
    if status != "finished:completed" or streamed.returncode:
        raise FlowerError(f"run {run_id} is {status}")


def _flwr(*arguments: str) -> dict[str, Any]:
    """Return the JSON answer of a `flwr` command."""
    done = subprocess.run(
        [*_FLWR, *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    try:
        answer = json.loads(done.stdout)
    except json.JSONDecodeError:
        answer = {"success": False, "error-message": done.stdout.strip()}
    if done.returncode or not answer.get("success"):
        raise FlowerError(answer.get("error-message", "flwr failed"))
    return dict(answer)
