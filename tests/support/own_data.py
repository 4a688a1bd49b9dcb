"""Nodes with data of their own: files, descriptions and configs."""

import csv
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.node_pb2 import NodeInfo
from pyarrow import parquet

from slora_flwr.engines.inline import InlineGrid
from slora_flwr.server.own_data_fleet import OwnDataFleet
from tests.support.runs import Config
from tests.support.tiny import SPECIAL, VOCAB

ROWS = [("red fox", "animal"), ("oak\nleaf", "plant"), ('an "elm", tall', "plant")]


def write(path: Path, rows: Iterable[tuple[Any, Any]] = ROWS) -> Path:
    records = [{"text": text, "label": label} for text, label in rows]
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


class HospitalGrid(InlineGrid):
    """Nodes with prepared descriptions."""

    def __init__(self, nodes: dict[int, dict[str, Any]]) -> None:
        super().__init__({})
        self.nodes = nodes
        self.since = dict.fromkeys(nodes, "Monday")
        self.asked: list[int] = []
        self.of_nodes = 1

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [
            NodeInfo(node_id=node, last_activated_at=at)
            for node, at in self.since.items()
        ]

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        self.asked.append(node)
        told = self.nodes[node]
        config = ConfigRecord(
            {
                "protocol": told.get("protocol", 7),
                "name": told["name"],
                "nodes": self.of_nodes,
            }
        )
        metrics = MetricRecord({"examples": told.get("examples", [])})
        if "labels" in told:
            config["labels"] = list(told["labels"])
            metrics["examples"] = list(told["labels"].values())
        if "client" in told:
            config["client"] = told["client"]
        if "skipped" in told:
            config["skipped"] = list(told["skipped"])
            metrics["skipped"] = list(told["skipped"].values())
        return Message(
            RecordDict({"config": config, "metrics": metrics}), reply_to=message
        )


def gathered(grid: HospitalGrid, **options: Any) -> OwnDataFleet:
    found = OwnDataFleet({"protocol": 7}, len(grid.since), 5.0, **options)
    found.gather(grid)
    return found


def hospital(name: str, **labels: int) -> dict[str, Any]:
    return {"name": name, "labels": labels}


def count_alone(name: str, examples: int) -> dict[str, Any]:
    return {"name": name, "examples": [examples]}


WORDS = [f"w{i}" for i in range(len(SPECIAL), VOCAB)]
KINDS = ["apples", "bridges", "clouds"]


def texts(seed: int, number: int, kinds: list[str]) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        kind = draw.choice(kinds)
        at = 20 * KINDS.index(kind)
        rows.append((" ".join(draw.choices(WORDS[at : at + 20], k=8)), kind))
    return rows


def make_own_data_config(tmp_path: Path, model: Path) -> Config:
    write(tmp_path / "node-0.csv", texts(0, 40, KINDS[:2]))
    write(tmp_path / "node-1.jsonl", texts(1, 30, KINDS[1:]))
    write(tmp_path / "node-2.csv", [*texts(2, 50, KINDS), ("", "apples")])
    return {
        "method": "slora",
        "rounds": 3,
        "sparse.rounds": 1,
        "sparse.density": 0.05,
        "lora.rank": 4,
        "model.name": str(model),
        "data.name": "node",
        "data.max-length": 12,
        "clients.count": 0,
        "clients.per-round": 3,
        "clients.min-nodes": 3,
        "clients.holdout": 0.2,
        "run.dir": str(tmp_path / "run"),
    }


def columns_of(path: Path, task: object = "classification") -> dict[str, str]:
    """Return the node config of a file with columns `text` and `label`.

    A language model learns to say the label.
    """
    key = "data-response" if task == "causal-lm" else "data-label"
    return {"data-path": str(path), "data-text": "text", key: "label"}


def as_dialogues(config: Config, model: Path) -> Config:
    """Return the config of a run on the same files by a language model."""
    named = {"data.text": "text", "data.response": "label"}
    return config | {"task": "causal-lm", "model.name": str(model)} | named


class NodesGrid(InlineGrid):
    """Nodes with configs as their operators would write them."""

    def __init__(self, config: Config, nodes: dict[str, Path]) -> None:
        super().__init__(config, len(nodes))
        self.replies: list[bytes] = []
        for context, (name, path) in zip(
            self._contexts.values(), nodes.items(), strict=True
        ):
            columns = columns_of(path, config.get("task", "classification"))
            context.node_config = {"name": name, **columns}

    def _answer(self, message: Message) -> Message:
        reply = super()._answer(message)
        self.replies.append(message_to_proto(reply).SerializeToString())
        return reply


def nodes_of(tmp_path: Path) -> dict[str, Path]:
    names = ("node-0.csv", "node-1.jsonl", "node-2.csv")
    return dict(zip("abc", (tmp_path / name for name in names), strict=True))
