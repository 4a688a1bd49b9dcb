"""What trackers' stores hold, read with the libraries' own readers."""

import json
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

PATIENCE = 300.0  # seconds

Rounds = dict[int, dict[str, float]]


@dataclass
class Stored:
    """One run in a store: each figure of each round must be there once."""

    config: dict[str, str] = field(default_factory=dict)
    rounds: Rounds = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    status: str = ""

    def add(self, number: int, name: str, value: float) -> None:
        figures = self.rounds.setdefault(number, {})
        assert name not in figures, f"{name} of round {number} is there twice"
        figures[name] = value


def read_tensorboard(run: Path) -> Stored:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = Stored()
    events = EventAccumulator(str(run / "tracking" / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    for name in tags["scalars"]:
        for scalar in events.Scalars(name):
            found.add(scalar.step, name, scalar.value)
    for text in tags["tensors"]:
        last = events.Tensors(text)[-1].tensor_proto.string_val[0].decode()
        if text == "config/text_summary":
            rows = [line.strip("|").split("|") for line in last.splitlines()[2:]]
            found.config = {key.strip(): value.strip() for key, value in rows}
        if text == "summary/text_summary":
            found.files.add("summary.json")
    return found


def read_mlflow(run: Path) -> Stored:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run}/tracking/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("slora")
    assert experiment is not None
    (one,) = client.search_runs([experiment.experiment_id])
    found = Stored(dict(one.data.params), status=one.info.status)
    for name in one.data.metrics:
        for metric in client.get_metric_history(one.info.run_id, name):
            found.add(metric.step, name, metric.value)
    folders = [""]
    while folders:
        for file in client.list_artifacts(one.info.run_id, folders.pop()):
            found.files.add(file.path)
            folders += [file.path] if file.is_dir else []
    return found


def read_trackio(run: Path) -> Stored:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    name = json.loads((run / "tracking" / "trackers.json").read_text())["trackio"]["id"]
    assert name.startswith(f"{run.name}-")
    (one,) = [one for one in trackio.Api().runs("slora") if one.name == name]
    config = {n: str(x) for n, x in (one.config or {}).items() if n[0] != "_"}
    found = Stored(config)
    for row in SQLiteStorage.get_logs("slora", one.name, run_id=one.id):
        for name, value in row.items():
            if name not in ("timestamp", "step"):
                found.add(row["step"], name, value)
    given = SQLiteStorage.get_run_artifacts("slora", one.name, one.id)["output"]
    for record in given:
        spec = f"v{record['version']}"
        kept = SQLiteStorage.get_artifact_manifest("slora", record["name"], spec)
        assert kept is not None
        found.files |= {entry["path"] for entry in kept["manifest"]}
    return found


def read_wandb(run: Path) -> Stored:
    found, ids = Stored(), set()
    paths = sorted((run / "tracking" / "wandb").rglob("*.wandb"))
    for path in paths:
        assert path.parent.name.startswith("offline-run")
        for record in _finished(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.add(record.run.run_id)
                for item in record.run.config.update:
                    if item.key != "_wandb":
                        found.config[item.key] = str(json.loads(item.value_json))
            if kind == "history":
                items = {
                    i.key or "/".join(i.nested_key): i for i in record.history.item
                }
                for name, item in items.items():
                    if not name.startswith("_"):
                        value = json.loads(item.value_json)
                        found.add(record.history.step.num, name, value)
            if kind == "artifact":
                entries = record.artifact.manifest.contents
                found.files |= {entry.path for entry in entries}
            if kind == "request" and record.request.HasField("log_artifact"):
                entries = record.request.log_artifact.artifact.manifest.contents
                found.files |= {entry.path for entry in entries}
            if kind == "exit":
                found.status = str(record.exit.exit_code)
    assert len(ids) == 1, (ids, paths, [path.stat().st_size for path in paths])
    return found


def _finished(path: Path) -> list[Any]:
    """Return the records of a run that has ended; W&B's service writes them later."""
    # Its names are made at the import, unseen by mypy.
    kinds: Any = import_module("wandb.proto.wandb_internal_pb2")
    until = time.monotonic() + PATIENCE
    while True:
        records = [
            kinds.Record.FromString(data) for data in _records(path.read_bytes())
        ]
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < until, f"{path} has no end"
        time.sleep(0.1)


def _records(data: bytes) -> Iterator[bytes]:
    """Yield the records of W&B's file: LevelDB's log, after a header of 7 bytes.

    Blocks have 32 KiB. A chunk has a checksum, its length and its kind: 1 for a whole
    record, 2, 3 and 4 for the first, a middle and the last part of one.
    """
    at, parts, block = 7, b"", 2**15
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += 7
        if not kind:
            return
        parts += data[at : at + length]
        at += length
        if kind in (1, 4):
            yield parts
            parts = b""


READERS: dict[str, Callable[[Path], Stored]] = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "trackio": read_trackio,
    "mlflow": read_mlflow,
}
