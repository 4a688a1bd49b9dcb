"""Whole runs over in-process nodes: their configs, and what they write."""

import csv
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from slora_flwr.common.tensors import State
from slora_flwr.config import Value
from slora_flwr.engines.inline import InlineGrid
from slora_flwr.server.run import run
from tests.support.tiny import CLASSES

Config = dict[str, Value]


CLIENTS = list(range(6))
HIDDEN, INNER, LAYERS, RANK = 32, 48, 2, 4  # of the tiny BERT
# By hand: each layer has four matrices of 32 x 32 and two of 32 x 48, of which a mask
# of density 0.05 takes round(51.2) and round(76.8) entries.
SPARSE_VALUES = LAYERS * (4 * 51 + 2 * 77)
LORA_VALUES = LAYERS * RANK * (4 * (HIDDEN + HIDDEN) + 2 * (HIDDEN + INNER))
HEAD_VALUES = len(CLASSES) * HIDDEN + len(CLASSES)


def make_config(corpus: Path, model: Path, directory: Path) -> Config:
    return {
        "method": "lora",
        "rounds": 3,
        "model.name": str(model),
        "data.name": str(corpus),
        "data.max-length": 12,
        "clients.count": 6,
        "clients.per-round": 6,
        "clients.partitioner": "iid",
        "train.batch-size": 32,
        "sparse.rounds": 1,
        "sparse.density": 0.05,
        "lora.rank": RANK,
        "run.dir": str(directory),
    }


def start(config: Config, grid: InlineGrid) -> Path:
    run(grid, config, grid.run.run_id, share=grid.share)
    return Path(str(config["run.dir"]))


def final(directory: Path, name: str = "last") -> State:
    return load_file(directory / "checkpoints" / f"{name}.safetensors")


def facts(directory: Path, name: str) -> dict[str, str]:
    path = directory / "checkpoints" / f"{name}.safetensors"
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    lines = (directory / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def summary(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "summary.json").read_text()))


def ledger(directory: Path) -> list[dict[str, str]]:
    with (directory / "ledger.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def payloads(directory: Path) -> list[tuple[int, str, str, int, int]]:
    return [
        (
            int(row["round"]),
            row["phase"],
            row["direction"],
            int(row["clients"]),
            int(row["payload_bytes"]),
        )
        for row in ledger(directory)
    ]


def elsewhere(config: Config, **changes: Value) -> Config:
    """Return the config of the same run in another directory."""
    return config | {"run.dir": f"{config['run.dir']}-other"} | changes


def assert_close(found: State, expected: State, within: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0.0, atol=within)


def differ(one: State, other: State) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


INT8: Config = {"upload.dtype": "int8", "download.dtype": "int8"}
TOP: Config = {"upload.top-k": 0.1, "upload.importance": "product"}
LOSSLESS: Config = {"upload.lossless": True, "download.lossless": True}


SLORA: Config = {"method": "slora"}


def arguments(config: Config) -> list[str]:
    pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    return ["run", "--engine", "inline", "--nodes", "2", "-c", pairs]
