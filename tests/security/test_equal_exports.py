"""Equal runs export equal files, byte for byte, in whatever process."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from slora_flwr.adapters.bottleneck import BOTTLENECK_FILE, export_bottlenecks
from tests.support.runs import Config, arguments

SLORA = "from slora_flwr.cli import app; app()"


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_adapters_of_equal_runs_are_equal(config: Config, tmp_path: Path) -> None:
    found = []
    for seed in ("1", "2"):  # of the order of a set's names
        config |= {"rounds": 1, "run.dir": str(tmp_path / seed)}
        subprocess.run(
            [sys.executable, "-c", SLORA, *arguments(config)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
        )
        found.append(read(tmp_path / seed / "adapter"))
    one, other = found
    assert "adapter_config.json" in one
    assert one == other


def test_metadata_of_an_export_have_one_order(tmp_path: Path) -> None:
    state = {"layer.down.weight": torch.ones(2, 3), "layer.up.weight": torch.zeros(3)}
    found = set()
    for i in range(12):
        folder = tmp_path / str(i)
        folder.mkdir()
        export_bottlenecks(folder, state, "houlsby", 8)
        found.add((folder / BOTTLENECK_FILE).read_bytes())
    assert len(found) == 1
