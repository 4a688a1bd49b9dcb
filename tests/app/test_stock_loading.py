"""Exports in stock PEFT and transformers, without slora_flwr: right, or refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from slora_flwr.config import parse
from slora_flwr.config.methods import METHODS
from slora_flwr.server.export import export_run
from slora_flwr.training.trainer import Trainer
from tests.support import stock
from tests.support.grids import RecordingGrid
from tests.support.runs import Config, make_config, start, summary
from tests.support.tiny import CLASSES

RUNS: dict[str, Config] = {
    **{method: {"method": method} for method in METHODS},
    "slora-w0": {"method": "slora", "lora.base": "w0"},
    "slora-warm": {"method": "slora", "lora.base": "warm-start"},
    "slora-exact": {"method": "slora", "lora.aggregator": "exact"},
    "per-round": {"method": "sft", "sparse.schedule": "per-round"},
    "federa": {"method": "lora", "lora.start": "federa"},
    "root-rank": {"method": "lora", "lora.scaling": "root-rank"},
}
# Exports that stock libraries cannot load as they are: they must refuse.
PATCHED = {"slora", "slora-warm", "slora-exact", "fedex-lora"}
WITH_LAYERS = {"houlsby", "pfeiffer"}
ADAPTERS = {n for n, c in RUNS.items() if "lora" in str(c["method"])} - PATCHED
Found = dict[str, dict[str, float | str]]


@pytest.fixture(scope="module")
def directories(
    corpus: Path,
    tiny_models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """The directories of finished runs."""
    made = {}
    for name, changes in RUNS.items():
        place = tmp_path_factory.mktemp(name) / "run"
        config = make_config(corpus, tiny_models["bert"], place)
        config |= {"train.lr": 0.02, "run.eval-plain": True, **changes}
        made[name] = start(config, RecordingGrid(config))
    return made


def config_of(name: str, directory: Path, corpus: Path, model: Path) -> Config:
    return make_config(corpus, model, directory) | RUNS[name]


def place(folder: Path, examples: Path, model: Path, to: Path) -> dict[str, Any]:
    """Copy an export to where its checkpoint is too."""
    shutil.copytree(folder, to)
    (to / model.name).symlink_to(model)
    return {
        "folder": str(to),
        "checkpoint": f"./{model.name}",
        "examples": str(examples),
        "labels": len(CLASSES),
    }


def load(places: dict[str, dict[str, Any]]) -> Found:
    """Load exports in a process that cannot import slora_flwr."""
    done = subprocess.run(
        [sys.executable, "-P", str(Path(stock.__file__))],
        input=json.dumps(places),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    line = next(x for x in done.stdout.splitlines() if x.startswith("FOUND "))
    return dict(json.loads(line.removeprefix("FOUND ")))


@pytest.fixture(scope="module")
def examples(
    corpus: Path,
    tiny_models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The runs' test data."""
    folder = tmp_path_factory.mktemp("examples")
    config = make_config(corpus, tiny_models["bert"], folder)
    test = Trainer(parse(config)).data.task.test
    ids, mask, labels = test.batch(np.arange(len(test)))
    path = folder / "examples.safetensors"
    save_file({"ids": ids, "mask": mask.to(torch.int64), "labels": labels}, path)
    return path


@pytest.fixture(scope="module")
def found(
    directories: dict[str, Path],
    examples: Path,
    tiny_models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Found:
    """What each way of loading found, by run."""
    root, bert = tmp_path_factory.mktemp("places"), tiny_models["bert"]
    places = {}
    for name, directory in directories.items():
        [folder] = {p.parent for p in directory.glob("*/classes.json")}
        places[name] = place(folder, examples, bert, root / name)
        if name not in WITH_LAYERS:
            merged = export_run(directory, "averaged", True, root / f"{name}-made")
            places[f"{name} merged"] = place(merged, examples, bert, root / f"{name}-m")
    return load(places)


@pytest.mark.parametrize("name", RUNS)
def test_it_has_the_runs_loss_or_is_refused(
    name: str, found: Found, directories: dict[str, Path]
) -> None:
    expected = pytest.approx(summary(directories[name])["loss"], abs=1e-5)
    losses = {way: x for way, x in found[name].items() if isinstance(x, float)}
    assert losses.pop("README") == expected, found[name]
    assert all(loss == expected for loss in losses.values()), losses
    if name in PATCHED | WITH_LAYERS:
        assert not losses
    elif name in ADAPTERS:
        assert {"PeftModel", "load_adapter", "AutoPeft, labels"} <= losses.keys()
    else:
        assert {"Auto", "Bert", "pipeline"} <= losses.keys()
    if name in PATCHED:
        for way in ("PeftModel", "load_adapter", "AutoPeftModel", "AutoPeft"):
            assert "README.md tells how to load" in str(found[name][way])


@pytest.mark.parametrize("name", sorted(RUNS.keys() - WITH_LAYERS))
def test_a_merged_export_is_a_model_of_transformers(
    name: str, found: Found, directories: dict[str, Path]
) -> None:
    expected = pytest.approx(summary(directories[name])["loss"], abs=1e-5)
    losses = found[f"{name} merged"]
    for way in ("README", "Auto", "Bert", "pipeline"):
        assert losses[way] == expected, (way, losses)
