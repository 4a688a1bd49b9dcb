"""Data that never leaves its node: what is read, what the server learns, who is in."""

import csv
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import SPECIAL, VOCAB, Clock
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.node_pb2 import NodeInfo
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.torch import load_file
from torch import Tensor

from slora_flwr.client import handlers as node
from slora_flwr.config import ConfigError, DataConfig, Value
from slora_flwr.data.node_files import OwnData, OwnDataError, load_test_texts
from slora_flwr.data.texts import Texts
from slora_flwr.engines.inline import InlineGrid
from slora_flwr.server import fleet
from slora_flwr.server.fleet import FleetError
from slora_flwr.server.own_data_fleet import OwnDataFleet
from slora_flwr.server.run import run
from slora_flwr.training.metrics import Evaluation, count, pool
from slora_flwr.wire.messages import write_evaluation

Config = dict[str, Value]
ROWS = [("red fox", "animal"), ("oak\nleaf", "plant"), ('an "elm", tall', "plant")]


# Reading


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


def load(path: Path, text: str = "text") -> tuple[Texts, dict[str, int]]:
    return OwnData(str(path), text, "label").load()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_file_is_read_in_its_order(tmp_path: Path, suffix: str) -> None:
    texts, skipped = load(write(tmp_path / f"a{suffix}"))
    assert list(zip(texts.texts, texts.labels, strict=True)) == ROWS
    assert skipped == {}


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    write(tmp_path / "b.csv", ROWS[:1])
    write(tmp_path / "a.jsonl", ROWS[1:])
    (tmp_path / "notes.txt").write_text("not data")
    texts, _ = load(tmp_path)
    assert texts.texts == [ROWS[1][0], ROWS[2][0], ROWS[0][0]]


def test_broken_csv_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        b"\xef\xbb\xbftext,label\n"
        b"good one,x\n"
        b"one field\n"
        b"a,b,c\n"
        b"caf\xe9,x\n"
        b",x\n"
        b"  ,x\n"
        b"no label,\n"
        b"good two,y\n"
    )
    texts, skipped = load(path)
    assert (texts.texts, texts.labels) == (["good one", "good two"], ["x", "y"])
    assert skipped == {"broken": 3, "no text": 2, "no label": 1}


def test_broken_json_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "good", "label": 1}',
        b'{"text": "half", "lab',
        b'["text", "label"]',
        b'{"text": "\xff", "label": 1}',
        b'{"text": "\\ud800", "label": 1}',
        b'{"label": 1}',
        b'{"text": "x", "label": null}',
        b"",
    ]
    path.write_bytes(b"\n".join(lines))
    texts, skipped = load(path)
    assert (texts.texts, texts.labels) == (["good"], ["1"])
    assert skipped == {"broken": 4, "no text": 1, "no label": 1}


def test_nulls_in_parquet_are_skipped_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [("a", "x"), (None, "x"), ("b", None)])
    texts, skipped = load(path)
    assert texts.texts == ["a"]
    assert skipped == {"no text": 1, "no label": 1}


def test_long_documents_are_read(tmp_path: Path) -> None:
    texts, skipped = load(write(tmp_path / "a.csv", [("word " * 100_000, "x")]))
    assert (len(texts.texts[0]), skipped) == (500_000, {})


def test_a_quote_that_is_never_closed_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\na,x\n"b,x\n' + "c,x\n" * 100)
    with pytest.raises(OwnDataError, match="a quote after line 2 is never closed"):
        load(path)


def test_a_deeply_nested_line_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("[" * 100_000 + '\n{"text": "a", "label": "x"}\n')
    assert load(path) == (Texts(["a"], ["x"]), {"broken": 1})


def test_other_columns_of_parquet_do_not_matter(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": ["a"],
            "label": ["x"],
            "when": pa.array([2**58], pa.timestamp("ms")),  # beyond Python's
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet") == (Texts(["a"], ["x"]), {})


def test_labels_are_as_they_are_written(tmp_path: Path) -> None:
    """No type is guessed, on the server as little as on a node."""
    labels = ["true", "01", "NA", "1.0"]
    path = write(tmp_path / "a.csv", [("a", label) for label in labels])
    assert load(path)[0].labels == labels
    assert load_test_texts(DataConfig(name="node", test=str(path))).labels == labels


def test_a_column_of_texts_is_not_told_as_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv")
    for source in (OwnData(str(path), "label", "label"), OwnData(str(path), "x", "y")):
        texts = Texts(["t"] * 1001, [str(i) for i in range(1001)])
        with pytest.raises(OwnDataError, match="is not one of labels"):
            source.labels(texts)
    with pytest.raises(OwnDataError, match="of up to 201 characters"):
        OwnData("", "x", "y").labels(Texts(["t"], ["a" * 201]))
    assert OwnData("", "x", "y").labels(Texts(["t"] * 3, ["b", "a", "b"])) == {
        "a": 1,
        "b": 2,
    }


def test_columns_are_joined(tmp_path: Path) -> None:
    texts, _ = load(write(tmp_path / "a.csv"), text="label, text")
    assert texts.texts[0] == "animal\nred fox"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_missing_column_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}")
    with pytest.raises(
        OwnDataError, match="no column body; its columns are text, label"
    ):
        load(path, text="body")


def test_a_file_that_is_not_what_it_says_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_text("text,label\n")
    with pytest.raises(OwnDataError, match="cannot be read"):
        load(path)


@pytest.mark.parametrize("name", ["", "missing.csv", "a.txt"])
def test_no_data_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(OwnDataError, match=r"allowed: a file .*, \.jsonl, \.parquet"):
        load(tmp_path / name)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".csv", ".jsonl"]))
def test_any_bytes_give_rows_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes((b"text,label\n" if suffix == ".csv" else b"") + content)
    try:
        texts, _ = load(path)
    except OwnDataError:
        return
    for text, label in zip(texts.texts, texts.labels, strict=True):
        assert text.strip().encode()
        assert label.encode()


def test_the_nodes_config_goes_before_the_runs() -> None:
    config = DataConfig(name="node", train="/sim/{}.csv", text="t", label="l")
    node_config = {"partition-id": 3, "num-partitions": 9}
    assert OwnData.of(node_config, config) == OwnData("/sim/3.csv", "t", "l")
    own = {"data-path": "/d", "data-text": "a,b", "data-label": "c", **node_config}
    assert OwnData.of(own, config) == OwnData("/d", "a,b", "c")
    with pytest.raises(OwnDataError, match="has no data-path"):
        OwnData.of({"name": "real"}, config)
    with pytest.raises(OwnDataError, match="has no data-path"):
        OwnData.of(node_config, DataConfig(name="node"))


# Pooled figures


def test_figures_of_parts_pool_to_those_of_the_whole() -> None:
    draw = np.random.default_rng(0)
    predicted, labels = draw.integers(0, 4, 90), draw.integers(0, 4, 90)
    cuts = [slice(0, 10), slice(10, 40), slice(40, 90)]
    parts = [
        Evaluation(loss, count(predicted[cut], labels[cut], 5))
        for loss, cut in zip([1.0, 2.0, 4.0], cuts, strict=True)
    ]
    whole = pool(parts)
    assert whole.examples == 90
    assert whole.loss == pytest.approx((10 * 1 + 30 * 2 + 50 * 4) / 90)
    assert whole.accuracy == pytest.approx(np.mean(predicted == labels))
    scores = []
    for c in range(4):
        right = np.sum((predicted == c) & (labels == c))
        wrong = np.sum((predicted == c) != (labels == c))
        scores.append(right / (right + wrong / 2))
    assert whole.macro_f1 == pytest.approx(np.mean(scores))
    assert whole.majority_accuracy == max(np.bincount(labels)) / 90


# The fleet


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(fleet, "time", clock)
    return clock


class HospitalGrid(InlineGrid):
    """Nodes whose descriptions are written down."""

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
                "code": told.get("code", "c0de"),
                "name": told["name"],
                "labels": list(told["labels"]),
                "nodes": self.of_nodes,
            }
        )
        metrics = MetricRecord({"examples": list(told["labels"].values())})
        if "client" in told:
            config["client"] = told["client"]
        if "skipped" in told:
            config["skipped"] = list(told["skipped"])
            metrics["skipped"] = list(told["skipped"].values())
        return Message(
            RecordDict({"config": config, "metrics": metrics}), reply_to=message
        )


def gathered(grid: HospitalGrid, **options: Any) -> OwnDataFleet:
    found = OwnDataFleet({"code": "c0de"}, len(grid.since), 5.0, **options)
    found.gather(grid)
    return found


def hospital(name: str, **labels: int) -> dict[str, Any]:
    return {"name": name, "labels": labels}


def test_labels_are_the_union_and_nodes_are_numbered_by_name(clock: Clock) -> None:
    grid = HospitalGrid(
        {
            7: hospital("b", flu=3, ok=1),
            8: hospital("a", ok=5),
            9: hospital("c", burn=2),
        }
    )
    found = gathered(grid, also=["rash"])
    assert found.classes == ["burn", "flu", "ok", "rash"]
    assert found.sizes == {0: 5, 1: 4, 2: 2}
    assert found.assign([0, 1, 2]) == {8: [0], 7: [1], 9: [2]}
    assert found.name(8) == "a (node 8)"


def test_given_labels_change_nothing_about_the_numbers(clock: Clock) -> None:
    grid = HospitalGrid({n: hospital(f"{9 - n}", x=n, z=1) for n in range(1, 9)})
    found = gathered(grid, labels=["x", "y"])
    assert found.classes == ["x", "y"]
    assert found.assign(range(8)) == {n: [8 - n] for n in range(1, 9)}


def test_a_nodes_own_number_is_kept(clock: Clock) -> None:
    one = hospital("a", x=1, y=2) | {"client": 5}
    found = gathered(HospitalGrid({7: one, 8: hospital("b", x=4)}))
    assert found.assign([0, 5]) == {7: [5], 8: [0]}


def test_numbers_of_their_own_go_first(clock: Clock) -> None:
    told = hospital("b", x=1) | {"client": 0}
    found = gathered(HospitalGrid({7: hospital("a", x=3, y=1), 8: told}))
    assert found.assign([0, 1]) == {8: [0], 7: [1]}


def test_it_waits_for_all_nodes_of_a_simulation(clock: Clock) -> None:
    grid = HospitalGrid({7: hospital("a", x=3), 8: hospital("b", y=1)})
    grid.of_nodes = 2
    all_nodes = dict(grid.since)

    def since() -> dict[int, str]:
        return all_nodes if clock.now > 1 else {7: "Monday"}

    grid.get_nodes = lambda: [  # type: ignore[method-assign]
        NodeInfo(node_id=n, last_activated_at=at) for n, at in since().items()
    ]
    assert gathered(grid).classes == ["x", "y"]


def test_labels_of_a_node_that_is_left_out_do_not_count(clock: Clock) -> None:
    other = hospital("a", z=1) | {"code": "old"}
    found = gathered(HospitalGrid({7: other, 8: hospital("b", x=1, y=1)}))
    assert found.classes == ["x", "y"]
    assert set(found.left_out) == {7}


def test_a_node_that_comes_later_takes_part_without_its_new_labels(
    clock: Clock,
) -> None:
    grid = HospitalGrid({7: hospital("a", x=3, y=1)})
    found = gathered(grid)
    grid.nodes |= {8: hospital("b", x=2, new=40), 9: hospital("c", new=9)}
    grid.since |= {8: "Tuesday", 9: "Tuesday"}
    found.refresh(grid)
    assert found.classes == ["x", "y"]
    assert found.sizes == {0: 4, 1: 2}
    assert found.left_out == {
        9: "it has 0 usable examples, clients.min-examples is 1; rows skipped: "
        "9 unknown label"
    }


def test_a_restarted_node_is_asked_again_and_stays_the_same_client(
    clock: Clock,
) -> None:
    grid = HospitalGrid({7: hospital("a", x=3, y=1), 8: hospital("b", x=1)})
    found = gathered(grid)
    # With node authentication it has its id again; without, another.
    grid.nodes |= {7: hospital("a", x=30), 9: hospital("b", x=2)}
    grid.since = {7: "Tuesday", 9: "Tuesday"}
    found.refresh(grid)
    assert found.sizes == {0: 30, 1: 2}
    assert found.assign([0, 1]) == {7: [0], 9: [1]}
    assert grid.asked == [7, 8, 7, 9]
    found.refresh(grid)
    assert grid.asked == [7, 8, 7, 9]


def test_two_nodes_cannot_be_one_client(clock: Clock) -> None:
    grid = HospitalGrid(
        {
            7: hospital("a", x=3, y=1) | {"client": 2},
            8: hospital("b", x=1) | {"client": 2},
        }
    )
    found = gathered(grid)
    assert found.left_out == {8: "client 2 is that of a (node 7)"}
    assert found.assign([2]) == {7: [2]}


def test_a_node_with_too_few_usable_rows_is_left_out_by_name(clock: Clock) -> None:
    few = hospital("few", x=2) | {"skipped": {"broken": 7}}
    found = gathered(HospitalGrid({7: few, 8: hospital("b", x=9, y=9)}), min_examples=3)
    assert found.left_out == {
        7: "it has 2 usable examples, clients.min-examples is 3; rows skipped: 7 broken"
    }


def test_one_label_is_no_task(clock: Clock) -> None:
    with pytest.raises(FleetError, match=r"labels are \['x'\]; at least two"):
        gathered(HospitalGrid({7: hospital("a", x=3)}))


def test_no_fitting_node_is_an_error_with_the_reasons(clock: Clock) -> None:
    grid = HospitalGrid({7: hospital("a", x=1, y=1) | {"code": "old"}})
    with pytest.raises(FleetError, match=r"no node can train \(node 7: code is 'old'"):
        gathered(grid)


@pytest.mark.parametrize(
    "labels", [{"x": -1, "y": 2}, {"x": 1.5, "y": 2.5}, {"": 1, "y": 2}]
)
def test_a_description_that_cannot_be_true_is_left_out(
    clock: Clock, labels: dict[str, Any]
) -> None:
    bad = {"name": "bad", "labels": labels}
    found = gathered(HospitalGrid({7: bad, 8: hospital("b", x=1, y=1)}))
    assert found.left_out[7].startswith("its description is off")
    assert found.classes == ["x", "y"]


# Whole runs


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


@pytest.fixture
def config(tmp_path: Path, tiny_models: dict[str, Path]) -> Config:
    write(tmp_path / "node-0.csv", texts(0, 40, KINDS[:2]))
    write(tmp_path / "node-1.jsonl", texts(1, 30, KINDS[1:]))
    write(tmp_path / "node-2.csv", [*texts(2, 50, KINDS), ("", "apples")])
    return {
        "method": "slora",
        "rounds": 3,
        "sparse.rounds": 1,
        "sparse.density": 0.05,
        "lora.rank": 4,
        "model.name": str(tiny_models["bert"]),
        "data.name": "node",
        "data.max-length": 12,
        "clients.count": 0,
        "clients.per-round": 3,
        "clients.min-nodes": 3,
        "clients.holdout": 0.2,
        "run.dir": str(tmp_path / "run"),
    }


class NodesGrid(InlineGrid):
    """Nodes with configs as their operators would write them."""

    def __init__(self, config: Config, nodes: dict[str, Path]) -> None:
        super().__init__(config, len(nodes))
        self.replies: list[bytes] = []
        for context, (name, path) in zip(
            self._contexts.values(), nodes.items(), strict=True
        ):
            context.node_config = {"name": name, "data-path": str(path)}

    def _answer(self, message: Message) -> Message:
        reply = super()._answer(message)
        self.replies.append(message_to_proto(reply).SerializeToString())
        return reply


def nodes_of(tmp_path: Path) -> dict[str, Path]:
    names = ("node-0.csv", "node-1.jsonl", "node-2.csv")
    return dict(zip("abc", (tmp_path / name for name in names), strict=True))


def final(config: Config) -> dict[str, Tensor]:
    folder = Path(str(config["run.dir"])) / "checkpoints"
    return load_file(folder / "last.safetensors")


def events(config: Config, kind: str) -> list[dict[str, Any]]:
    lines = (Path(str(config["run.dir"])) / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_a_run_on_own_data(config: Config, tmp_path: Path) -> None:
    grid = NodesGrid(config, nodes_of(tmp_path))
    summary = run(grid, config, run_id=1)
    told = {
        e["name"]: (e["client"], e["examples"], e["skipped"])
        for e in events(config, "node")
    }
    assert told == {"a": (0, 40, {}), "b": (1, 30, {}), "c": (2, 50, {"no text": 1})}
    # 8 + 6 + 10 held out; all that are online evaluate.
    assert 0 < summary["accuracy"] <= 1
    assert summary["accuracy"] * 24 == pytest.approx(round(summary["accuracy"] * 24))
    for event in events(config, "round"):
        assert {c: f["examples"] for c, f in event["clients"].items()} == {
            "0": 32,
            "1": 24,
            "2": 40,
        }
    classes = Path(str(config["run.dir"])) / "adapter" / "classes.json"
    assert json.loads(classes.read_text()) == KINDS


def test_no_text_leaves_a_node(config: Config, tmp_path: Path) -> None:
    grid = NodesGrid(config, nodes_of(tmp_path))
    run(grid, config, run_id=1)
    sent = b"".join(grid.replies)
    assert b"apples" in sent
    # Two words: one could come up in the numbers by chance.
    assert not re.search(rb"w\d+ w\d+", sent)
    assert str(tmp_path).encode() not in sent


def test_a_node_whose_data_grew_is_asked_again(config: Config, tmp_path: Path) -> None:
    class GrowingGrid(NodesGrid):
        def _answer(self, message: Message) -> Message:
            if message.metadata.group_id == "2" and grown.is_file():
                write(grown, texts(0, 60, KINDS[:2]))
                node._worker.cache_clear()
            return super()._answer(message)

    grown = tmp_path / "node-0.csv"
    config |= {"rounds": 4}
    run(GrowingGrid(config, nodes_of(tmp_path)), config, run_id=1)
    [failure] = events(config, "failure")
    assert failure["round"] == 2
    assert "its weights are [48], not from 1 to [40]" in failure["reason"]
    last = events(config, "round")[-1]
    assert last["clients"]["0"]["examples"] == 48


def test_a_node_cannot_evaluate_on_more_than_it_has(
    config: Config, tmp_path: Path
) -> None:
    class BoastfulGrid(NodesGrid):
        def _answer(self, message: Message) -> Message:
            reply = super()._answer(message)
            facts = reply.metadata
            if (facts.message_type, facts.src_node_id) == ("evaluate", 1):
                counts = np.zeros((3, 3), dtype=np.int64)
                counts[:, 0] = 2**62
                reply.content = write_evaluation(Evaluation(0.1, counts))
            return reply

    summary = run(BoastfulGrid(config, nodes_of(tmp_path)), config, run_id=1)
    reasons = {e["reason"] for e in events(config, "failure")}
    assert reasons == {f"it evaluates on {2**62} examples, and has 40"}
    assert summary["accuracy"] * 16 == pytest.approx(round(summary["accuracy"] * 16))


def test_server_side_test_data_and_simulated_nodes(
    config: Config, tmp_path: Path
) -> None:
    test = write(tmp_path / "test.csv", texts(3, 60, KINDS))
    config |= {"data.test": str(test), "clients.holdout": 0.0}
    run(NodesGrid(config, nodes_of(tmp_path)), config, run_id=1)
    deployed = final(config)

    write(tmp_path / "node-1.csv", texts(1, 30, KINDS[1:]))
    config |= {"data.train": f"{tmp_path}/node-{{}}.csv", "run.dir": f"{tmp_path}/sim"}
    summary = run(InlineGrid(config, nodes=3), config, run_id=2)
    simulated = final(config)
    assert all(deployed[name].equal(simulated[name]) for name in deployed)
    assert summary["accuracy"] * 60 == pytest.approx(round(summary["accuracy"] * 60))


def test_given_labels_leave_others_out(config: Config, tmp_path: Path) -> None:
    config |= {"data.labels": "apples,bridges", "clients.min-examples": 20}
    run(NodesGrid(config, nodes_of(tmp_path)), config, run_id=1)
    [left] = events(config, "left_out")
    told = {e["name"]: e["skipped"] for e in events(config, "node")}
    assert left["name"].startswith("b (node")
    assert {name: s.get("unknown label", 0) for name, s in told.items()} == {
        "a": 0,
        "c": sum(kind == "clouds" for _, kind in texts(2, 50, KINDS)),
    }


def test_test_data_of_other_labels_is_an_error(config: Config, tmp_path: Path) -> None:
    test = write(tmp_path / "test.csv", texts(3, 60, KINDS))
    config |= {"data.test": str(test), "data.labels": "apples,bridges"}
    grid = NodesGrid(config, nodes_of(tmp_path))
    with pytest.raises(ConfigError, match=r"holds the labels clouds; allowed: those"):
        run(grid, config, run_id=1)
    assert grid.replies == []


def test_a_node_without_data_is_named_and_its_path_is_not(
    config: Config, tmp_path: Path
) -> None:
    nodes = nodes_of(tmp_path) | {"b": tmp_path / "secret.csv"}
    grid = NodesGrid(config, nodes)
    run(grid, config, run_id=1)
    [left] = events(config, "left_out")
    assert "b: its data is of no use; its own log says why" in left["reason"]
    assert b"secret" not in b"".join(grid.replies)
    assert {c for e in events(config, "round") for c in e["clients"]} == {"0", "1"}
