"""An operator's bad day: one clear error for files that cannot be read or written."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features
from datasets import Value as Kind
from pyarrow import parquet
from typer.testing import CliRunner

from slora_flwr.cli import app
from slora_flwr.client.base_cache import find_base, keep_base
from slora_flwr.config import ConfigError, DataConfig
from slora_flwr.data.data_sets import load_texts
from slora_flwr.data.node_files import OwnData, OwnDataError
from slora_flwr.data.texts import Texts
from slora_flwr.engines.inline import InlineGrid
from slora_flwr.runs.writing import RunDirectoryError, writing
from slora_flwr.server.run import run
from slora_flwr.wire.messages import BaseDelta
from slora_flwr.wire.packing import pack
from slora_flwr.wire.state_channel import name_version
from tests.support.runs import Config, arguments

HEAD = "text,label\n"


def load(path: Path, **changes: Any) -> list[tuple[str, str]]:
    found = load_texts(DataConfig(name=str(path), **changes))
    return [
        pair for part in found for pair in zip(part.texts, part.labels, strict=True)
    ]


BAD = {
    "empty": ("a.csv", b"", "has no rows below a header"),
    "only-a-header": ("a.csv", HEAD.encode(), "has no rows below a header"),
    "ragged-long": ("a.csv", b"text,label\na,b\n\nc,d,e\n", "line 4 has 3 fields, the"),
    "ragged-short": ("a.csv", b"text,label\na,b\nc\n", "line 3 has 1 fields, the head"),
    "latin-1": ("a.csv", "text,label\nä,b\n".encode("latin-1"), "not UTF-8"),
    "utf-16": ("a.csv", "text,label\na,b\n".encode("utf-16"), "not UTF-8"),
    "utf-16-no-mark": ("a.csv", "text,label\na,b\n".encode("utf-16-le"), "zero bytes"),
    "open-quote": ("a.csv", b'text,label\na,b\n"c,d\ne,f\n', "line 3 is never closed"),
    "bad-quote": ("a.csv", b'text,label\n"a"b,c\n', "the row at line 2: "),
    "twice": ("a.csv", b"text,label,label\na,b,c\n", "columns are named label"),
    "bad-json": ("a.json", b'[{"text": "a"', "cannot be read"),
    "json-of-numbers": ("a.json", b"[1, 2]", "row 1 is not an object"),
    "json-empty": ("a.json", b"[]", "has no rows"),
    "json-latin-1": ("a.json", '[{"text": "ä"}]'.encode("latin-1"), "not UTF-8"),
    "json-deep": ("a.json", b"[" * 100_000, "cannot be read"),
    "bad-line": ("a.jsonl", b'{"text": "a", "label": "b"}\n{"te', "line 2 is not JSON"),
    "no-parquet": ("a.parquet", b"PAR1 and more", "cannot be read"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_cannot_be_read_is_one_clear_error(
    tmp_path: Path, kind: str
) -> None:
    name, content, reason = BAD[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as caught:
        load(tmp_path / name)
    assert str(caught.value).startswith(f"data file {tmp_path / name} ")
    assert "; allowed: " in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_parquet_file_with_damaged_pages_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    draw = np.random.default_rng(0)
    rows = [{"text": draw.bytes(40).hex(), "label": f"{i % 3}"} for i in range(2000)]
    parquet.write_table(pa.Table.from_pylist(rows), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\xff" * 50_000 + whole[50_004:])
    with pytest.raises(ConfigError, match="cannot be read"):
        load(path)


LABELS = {
    "one-class": ('{"text": "a", "label": "x"}\n' * 9, "has the label x alone"),
    "null": ('{"text": "a", "label": null}\n', "missing in 1 of 1 rows"),
    "absent": (
        '{"text": "a", "label": "b"}\n' + 2 * '{"text": "a"}\n',
        "'label', which is missing in 2 of 3 rows, counted from 1: 2, 3$",
    ),
    "nan": ('{"text": "a", "label": NaN}\n', "missing in 1 of 1 rows"),
    "dict": ('{"text": "a", "label": {"b": 1}}\n', "holds a dict in row 1"),
    "list": ('{"text": "a", "label": ["b"]}\n', "holds a list in row 1"),
    "half": ('{"text": "a", "label": "b\\ud800"}\n', "holds 'b.ud800' in row 1"),
    "text-half": ('{"text": "a\\ud800", "label": "b"}\n', "holds 'a.ud800' in row 1"),
    "text-dict": ('{"text": {"a": 1}, "label": "b"}\n', "holds a dict in row 1"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_values_that_are_no_labels_are_one_clear_error(
    tmp_path: Path, kind: str
) -> None:
    content, reason = LABELS[kind]
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=reason):
        load(tmp_path / "a.jsonl")


def test_labels_stay_as_they_are_written(tmp_path: Path) -> None:
    written = ["007", "7", "1.50", "true", "NA", "1e3"]
    rows = "".join(f"text {i},{label}\n" for i, label in enumerate(10 * written))
    (tmp_path / "a.csv").write_text(HEAD + rows)
    assert {label for _, label in load(tmp_path / "a.csv")} == set(written)


def test_rows_without_text_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.csv").write_text(f"{HEAD}a,x\n,y\n  ,x\nb,y\n")
    assert len(load(tmp_path / "a.csv")) == 4
    assert "data.text: 2 of 4 rows of train have no text" in caplog.text


def test_labels_of_a_file_that_look_alike_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.csv").write_text(f"{HEAD}a,flu\nb,Flu\nc,flu \nd,fl\u200bu\ne,ok\n")
    load(tmp_path / "a.csv")
    told = r"are different classes: 'Flu', 'flu', 'flu ', 'fl\u200bu'"
    assert told in caplog.text


def test_numbered_labels_of_a_parquet_file_have_their_names(tmp_path: Path) -> None:
    features = Features({"text": Kind("string"), "label": ClassLabel(names=["x", "y"])})

    def save(*labels: int) -> None:
        rows = {"text": ["a", "b", "c"], "label": labels}
        Dataset.from_dict(rows, features).to_parquet(str(tmp_path / "a.parquet"))

    save(1, 0, 1)
    assert sorted(load(tmp_path / "a.parquet")) == [("a", "y"), ("b", "x"), ("c", "y")]
    save(-1, 0, 1)
    with pytest.raises(ConfigError, match="missing in 1 of 3 rows, counted from 1: 1"):
        load(tmp_path / "a.parquet")


def no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Set a home that nobody can make, not even root."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLORA_HOME", str(tmp_path / "file" / "home"))
    return tmp_path / "file" / "home"


def test_a_home_that_cannot_be_written_is_one_clear_error(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = no_home(monkeypatch, tmp_path)
    done = CliRunner().invoke(app, arguments(config))
    assert done.exit_code == 2
    assert done.output.startswith(f"Error: $SLORA_HOME is '{home}'; allowed: ")
    assert len(done.output.splitlines()) == 1


FULL = """
import resource
import sys
from slora_flwr.cli import app
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
app(sys.argv[1:])
"""


def test_a_full_home_is_one_clear_error(config: Config, tmp_path: Path) -> None:
    home = tmp_path / "home"
    done = subprocess.run(
        [sys.executable, "-c", FULL, *arguments(config)],
        env=os.environ | {"SLORA_HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert f"Error: $SLORA_HOME is '{home}'; allowed: " in done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_node_goes_on_without_room_for_a_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = no_home(monkeypatch, tmp_path)
    start = pack({})
    known = name_version(start.data)
    delta = BaseDelta(known=known, start=start)
    assert find_base(delta, home / "cache" / "run-1") == start.data
    keep_base(delta, home / "cache" / "run-1")


def test_resuming_is_offered_only_where_there_is_a_checkpoint(tmp_path: Path) -> None:
    with (
        pytest.raises(RunDirectoryError, match="it holds no chec"),
        writing(tmp_path),
    ):
        raise OSError("full")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "round-0001.safetensors").touch()
    with (
        pytest.raises(RunDirectoryError, match=r"run\.resume contin"),
        writing(tmp_path),
    ):
        raise OSError("full")


def test_a_report_that_cannot_be_written_is_one_clear_error(
    config: Config, tmp_path: Path
) -> None:
    config |= {"rounds": 1}
    run(InlineGrid(config), config, 1)
    (tmp_path / "file").write_text("")
    for command in ("report", "compare"):
        out = str(tmp_path / "file" / "out")
        given = [command, str(config["run.dir"]), "--out", out]
        done = CliRunner().invoke(app, given)
        assert done.exit_code == 1
        assert done.output.startswith(f"Error: {out} cannot be written (")


@pytest.mark.parametrize("seed", [2, 4])  # none of one round, one of two
def test_a_private_run_with_an_empty_cohort_has_a_report(
    config: Config, seed: int
) -> None:
    rounds = 1 if seed == 2 else 2
    config |= {"rounds": rounds, "clients.per-round": 1, "privacy.delta": 0.01}
    config |= {"privacy.noise-multiplier": 1.0, "privacy.clip-norm": 1.0}
    run(InlineGrid(config), config, 1, generator=np.random.default_rng(seed))
    for command in ("report", "compare"):
        out = str(config["run.dir"]) + command
        given = [command, str(config["run.dir"]), "--out", out]
        assert CliRunner().invoke(app, given).exit_code == 0


NO_VALUES = {
    "nan": '{"text": "a", "label": NaN}',
    "list": '{"text": "a", "label": ["x"]}',
    "dict": '{"text": "a", "label": {"x": 1}}',
    "text-nan": '{"text": NaN, "label": "x"}',
    "text-list": '{"text": ["a"], "label": "x"}',
    "text-dict": '{"text": {"a": 1}, "label": "x"}',
}


@pytest.mark.parametrize("kind", NO_VALUES)
def test_what_is_no_text_or_label_of_a_node_is_a_broken_row(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "b", "label": true}}\n{NO_VALUES[kind]}\n')
    assert OwnData(str(path), "text", "label").load() == (
        Texts(["b"], ["True"]),
        {"broken": 1},
    )


def test_bytes_and_nan_of_a_nodes_parquet_file_are_broken_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    labels = {"bytes": [b"a", None], "nan": [math.nan, 1.5]}
    for name, values in labels.items():
        parquet.write_table(pa.table({"text": ["a", "b"], name: values}), path)
        texts, skipped = OwnData(str(path), "text", name).load()
        assert skipped["broken"] == 1
        assert texts.labels == (["1.5"] if name == "nan" else [])


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_two_columns_of_a_nodes_file_have_two_names(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".csv":
        path.write_text("text,label,label\na,x,y\n")
    else:
        names = ["text", "label", "label"]
        parquet.write_table(pa.table([["a"], ["x"], ["y"]], names=names), path)
    with pytest.raises(OwnDataError, match="several columns are named label"):
        OwnData(str(path), "text", "label").load()


@pytest.mark.timeout(60)
def test_a_nodes_folder_may_hold_what_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"{HEAD}a,x\n")
    (tmp_path / "._a.csv").write_bytes(b"\0\5\26\7")
    (tmp_path / "old.csv").mkdir()
    os.mkfifo(tmp_path / "b.csv")
    assert OwnData(str(tmp_path), "text", "label").load() == (Texts(["a"], ["x"]), {})
