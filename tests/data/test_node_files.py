"""Data that never leaves its node: what is read, what the server learns, who is in."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from slora_flwr.config import ConfigError, DataConfig
from slora_flwr.data.dialogues import answered, ask
from slora_flwr.data.node_files import OwnData, OwnDataError, load_test_texts
from slora_flwr.data.texts import Texts
from tests.support.own_data import ROWS, write


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


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("label", ["a"] * 10 + ["b"] * 10),
        ("text", [str(i) for i in range(1001) for _ in range(5)]),
        ("text", ["a" * 201] * 10 + ["b"] * 10),
    ],
)
def test_a_column_of_texts_is_not_told_as_labels(
    tmp_path: Path, text: str, labels: list[str]
) -> None:
    path = write(tmp_path / "a.jsonl", [("t", label) for label in labels])
    with pytest.raises(OwnDataError, match="does not look like labels"):
        OwnData(str(path), text, "label").usable()


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
    with pytest.raises(OwnDataError, match=r"allowed: an existing file .*, \.parquet"):
        load(tmp_path / name)


@settings(max_examples=200)
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


def test_a_simulated_nodes_data_is_the_runs() -> None:
    config = DataConfig(name="node", text="t", label="l")
    node_config = {"partition-id": 3, "num-partitions": 9}
    found = OwnData.of(node_config, config, "/sim/{}.csv")
    assert found == OwnData("/sim/3.csv", "t", "l")
    with pytest.raises(OwnDataError, match="has no data-path"):
        OwnData.of(node_config, config)


def test_a_nodes_own_config_goes_before_the_runs() -> None:
    config = DataConfig(name="node", text="t", label="l")
    own: dict[str, str | int] = {
        "data-path": "/d",
        "data-text": "a,b",
        "data-label": "c",
    }
    for train in ("", "/sim/{}.csv"):
        assert OwnData.of(own, config, train) == OwnData("/d", "a,b", "c")
    own |= {"data-labels": "x, y,", "min-examples": 30, "min-of-label": 7}
    expected = OwnData("/d", "a,b", "c", ("x", "y"), 30, 7)
    assert OwnData.of(own, config) == expected


@pytest.mark.parametrize("key", ["min-examples", "min-of-label"])
@pytest.mark.parametrize("given", [0, -1, "9", 1.5, True])
def test_a_limit_is_a_whole_number(key: str, given: object) -> None:
    with pytest.raises(OwnDataError, match=f"{key} is .*; allowed: a whole number"):
        OwnData.of({"data-path": "/d", key: given}, DataConfig(name="node"))


# Dialogues


TURNS = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]


def write_dialogues(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_prompts_and_responses_are_read_and_skipped_rows_counted(
    tmp_path: Path, suffix: str
) -> None:
    rows: list[dict[str, object]] = [
        {"ask": "Add.", "with": "1 and 2", "say": "3"},
        {"ask": "Hi", "with": None, "say": "Ho"},
        {"ask": "Hi", "with": "", "say": " "},
        {"ask": " ", "with": None, "say": "Ho"},
        {"ask": "Hi", "with": None, "say": None},
    ]
    path = write_dialogues(tmp_path / f"a{suffix}", rows)
    source = OwnData(str(path), "ask, with", "", min_examples=2, response="say")
    found, skipped = source.usable()
    assert found.dialogues == [
        answered(ask(["Add.", "1 and 2"]), "3"),
        answered(ask(["Hi"]), "Ho"),
    ]
    assert found.texts == ["Add.\n1 and 2\n3", "Hi\nHo"]
    assert skipped == {"no response": 2, "no text": 1}
    with pytest.raises(OwnDataError, match="2 no response, 1 no text"):
        OwnData(str(path), "ask", "", response="say").usable()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_conversations_are_read_and_others_are_broken(
    tmp_path: Path, suffix: str
) -> None:
    rows: list[dict[str, object]] = [
        {"chat": TURNS * 2},
        {"chat": TURNS[:1]},
        {"chat": [{"role": "robot", "content": "w1"}]},
        {"chat": None},
    ]
    path = write_dialogues(tmp_path / f"a{suffix}", rows)
    found, skipped = OwnData(str(path), "", "", messages="chat").load()
    assert found.dialogues == [TURNS * 2]
    assert skipped == {"broken": 3}


def test_a_message_with_half_a_character_is_broken(tmp_path: Path) -> None:
    turns = [TURNS[0], {"role": "assistant", "content": "\ud800"}]
    path = write_dialogues(tmp_path / "a.jsonl", [{"chat": turns}])
    assert OwnData(str(path), "", "", messages="chat").load()[1] == {"broken": 1}


def test_texts_of_their_own_are_learned_themselves(tmp_path: Path) -> None:
    path = write_dialogues(tmp_path / "a.jsonl", [{"text": "w1 w2"}, {"text": 3}])
    found, _ = OwnData(str(path), "text", "").load()
    assert found.dialogues == [answered([], "w1 w2"), answered([], "3")]


def test_a_language_models_columns(tmp_path: Path) -> None:
    config, path = DataConfig(name="node"), {"data-path": "/d"}

    def of(train: str = "", **given: str) -> OwnData:
        named = {f"data-{key}": value for key, value in given.items()}
        node = (path if not train else {"partition-id": 3}) | named
        return OwnData.of(node, config, train, dialogues=True)

    assert of(text="a,b", response="c") == OwnData("/d", "a,b", "", response="c")
    assert of(messages="m", text="a") == OwnData("/d", "", "", messages="m")
    assert of(text="a") == OwnData("/d", "a", "")
    both = of(text="a", label="l", response="c")
    assert both == OwnData("/d", "a", "", response="c")
    with pytest.raises(OwnDataError, match="data-label is 'l', and the run trains"):
        of(text="a", label="l")
    with pytest.raises(OwnDataError, match="data-text is ''"):
        of(response="c")
    with pytest.raises(OwnDataError, match="'c'; allowed: a column that data-text"):
        of(text="a, c", response="c")
    simulated = OwnData("/s/3.csv", "prompt", "", response="response")
    assert of("/s/{}.csv") == simulated


def test_the_servers_test_dialogues_are_those_of_the_runs_columns(
    tmp_path: Path,
) -> None:
    path = write_dialogues(tmp_path / "a.jsonl", [{"chat": TURNS}] * 3)
    config = DataConfig(name="node", test=str(path), messages="chat")
    assert load_test_texts(config, dialogues=True).dialogues == [TURNS] * 3
    config = DataConfig(name="node", test=str(path))
    with pytest.raises(ConfigError, match="no column prompt, response; its columns"):
        load_test_texts(config, dialogues=True)
