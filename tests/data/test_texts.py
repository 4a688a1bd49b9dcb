"""Data sets: files, folders, columns, splits, presets, and the token cache."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slora_flwr.config import ConfigError, DataConfig
from slora_flwr.data.data_sets import load_texts
from slora_flwr.data.examples import Examples
from slora_flwr.data.texts import Texts, list_classes
from slora_flwr.data.tokens import tokenise
from slora_flwr.tasks.classification import Classification

COLORS = ["red", "blue", "green"]
ROWS: list[dict[str, Any]] = [
    {"text": f"text number {i}", "label": COLORS[i % 3]} for i in range(600)
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLORA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SLORA_ASSETS", raising=False)


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(map(str, r.values())) for r in rows)]
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


def pairs(*parts: Texts) -> list[tuple[str, str]]:
    return [p for part in parts for p in zip(part.texts, part.labels, strict=True)]


def load(path: Path | str, **changes: Any) -> tuple[Texts, Texts]:
    return load_texts(DataConfig(name=str(path), **changes))


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_a_file_is_read_and_split(tmp_path: Path, suffix: str) -> None:
    train, test = load(write(tmp_path / f"data.{suffix}"))
    expected = [(row["text"], row["label"]) for row in ROWS]
    assert sorted(pairs(train, test)) == sorted(expected)
    assert list_classes((train, test)) == ["blue", "green", "red"]


def test_a_fifth_is_for_testing_and_always_the_same(tmp_path: Path) -> None:
    train, test = load(write(tmp_path / "a.csv"))
    # Binomial(600, 0.2): 120, standard deviation 9.8.
    assert 80 < len(test.texts) < 160
    assert not set(train.texts) & set(test.texts)
    # Whatever other rows there are, in whatever order and format.
    rows = list(reversed(ROWS[::2]))
    half = load(write(tmp_path / "b.jsonl", rows))
    assert set(half[1].texts) == set(test.texts) & {row["text"] for row in rows}


def test_the_split_is_by_the_hash_of_each_text(tmp_path: Path) -> None:
    from hashlib import blake2b

    _, test = load(write(tmp_path / "a.csv"))
    drawn = {
        row["text"]: blake2b(row["text"].encode(), digest_size=8, person=b"test")
        for row in ROWS
    }
    expected = [
        text
        for text, digest in drawn.items()
        if int.from_bytes(digest.digest(), "big") / 2**64 < 0.2
    ]
    assert test.texts == expected


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_folder_has_a_file_for_each_split(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"train.{suffix}", ROWS[:50])
    write(tmp_path / f"held.{suffix}", ROWS[50:60])
    train, test = load(tmp_path, test="held")
    assert train.texts == [row["text"] for row in ROWS[:50]]
    assert test.texts == [row["text"] for row in ROWS[50:60]]


def test_splits_may_name_files(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", ROWS[:50])
    write(tmp_path / "b.jsonl", ROWS[50:60])
    for train, test in (
        load(tmp_path, train="a.csv", test="b.jsonl"),
        load("mine", train=str(tmp_path / "a.csv"), test=str(tmp_path / "b.jsonl")),
    ):
        assert train.texts == [row["text"] for row in ROWS[:50]]
        assert test.texts == [row["text"] for row in ROWS[50:60]]


def test_a_folder_without_the_split_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "train.csv")
    with pytest.raises(ConfigError, match=r"data\.name .* without a file for split 'e"):
        load(tmp_path, test="exam")


def test_a_file_has_no_test_split_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.test"):
        load(write(tmp_path / "a.csv"), test="test")


def test_text_columns_are_joined_in_order(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"title": "One", "body": "first", "topic": 1},
        {"title": "Two", "body": None, "topic": 0},
    ]
    path = write(tmp_path / "train.json", rows)
    write(tmp_path / "test.json", rows)
    train, _ = load(path.parent, test="test", text="body, title", label="topic")
    assert pairs(train) == [("first\nOne", "1"), ("\nTwo", "0")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "body"}, "data.text names 'body'; the columns are text, label"),
        ({"text": "text,body"}, "data.text names 'body'; the columns are text, label"),
        ({"label": "topic"}, "data.label names 'topic'; the columns are text, label"),
    ],
)
def test_a_missing_column_is_an_error_with_those_there_are(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path / "a.csv"), **changes)
    assert str(caught.value) == message


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "train.csv")
    with pytest.raises(ConfigError, match=r"data file .*test\.csv does not exist; all"):
        load(tmp_path, test="test.csv")
    with pytest.raises(ConfigError, match=r"data\.name is '.*none\.csv'; allowed: "):
        load(tmp_path / "none.csv")


def test_a_file_of_another_kind_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"a\.xlsx; allowed: \.csv, \.json, "):
        load(tmp_path / "a.xlsx")


@pytest.mark.filterwarnings("ignore")
def test_a_hub_id_that_cannot_be_reached_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"data\.name is 'nobody/nothing'; allowed: "):
        load("nobody/nothing")


def test_validation_is_part_of_the_training_data_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv")
    train, test = load(path)
    rest, validation = load(path, validation=0.25)
    assert set(rest.texts) | set(validation.texts) == set(train.texts)
    assert not set(rest.texts) & set(validation.texts)
    assert not set(validation.texts) & set(test.texts)
    assert 0.15 < len(validation.texts) / len(train.texts) < 0.35


def test_max_test_takes_the_same_few(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv")
    train, test = load(path)
    same, few = load(path, max_test=10)
    fewer = load(path, max_test=5)[1]
    assert same == train
    assert len(few.texts) == 10
    assert set(fewer.texts) < set(few.texts) < set(test.texts)
    assert load(path, max_test=10_000)[1] == test


def test_the_standard_library_is_a_data_set_of_its_own() -> None:
    texts = load("stdlib-docs")
    assert texts == load("stdlib-docs")
    assert 8 <= len(list_classes(texts)) <= 12
    train, test = (len(part.texts) for part in texts)
    # 5,317 in all where tkinter is a package of its own, as in Debian.
    assert train + test > 5000
    assert 0.17 < test / (train + test) < 0.23
    assert not set(texts[0].texts) & set(texts[1].texts)


def test_20newsgroups_is_complete(
    assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLORA_ASSETS", str(assets))
    if not (assets / "data" / "20newsgroups").is_dir():
        pytest.skip("no 20newsgroups below SLORA_ASSETS")
    train, test = load("20newsgroups")
    assert (len(train.texts), len(test.texts)) == (11_314, 7_532)
    classes = list_classes((train, test))
    assert len(classes) == 20
    assert {"alt.atheism", "sci.space"} < set(classes)


def test_news_category_is_complete(
    assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLORA_ASSETS", str(assets))
    if not (assets / "data" / "news_category").is_dir():
        pytest.skip("no news_category below SLORA_ASSETS")
    texts = load("news-category")
    assert len(texts[0].texts) + len(texts[1].texts) == 9_999
    assert len(list_classes(texts)) == 29
    assert "\n" in texts[0].texts[0]


class Words:
    """A tokeniser whose tokens are the lengths of words."""

    pad_token_id = 9

    def __init__(self, name: str = "lengths") -> None:
        self.calls = 0
        self.backend_tokenizer = SimpleNamespace(
            to_str=lambda: name, no_truncation=lambda: None
        )

    def __call__(
        self, texts: list[str], max_length: int, **_: Any
    ) -> dict[str, list[list[int]]]:
        self.calls += 1
        rows = [[len(word) for word in text.split()] for text in texts]
        return {"input_ids": [row[:max_length] for row in rows]}


TEXTS = (
    Texts(["a bb ccc", "dddd", ""], ["red", "blue", "red"]),
    Texts(["a b c d e f"], ["green"]),
)


class Made(NamedTuple):
    """Tokenised texts."""

    train: Examples
    test: Examples


def make(tokenizer: Words, texts: tuple[Texts, Texts] = TEXTS, length: int = 4) -> Made:
    encoder = Classification().encoder(DataConfig(max_length=length), tokenizer)
    return Made(*(tokenise(encoder, list_classes(texts), part) for part in texts))


def test_examples_hold_tokens_and_numbered_labels() -> None:
    made = make(Words())
    assert list_classes(TEXTS) == ["blue", "green", "red"]
    assert made.train.tokens.tolist() == [1, 2, 3, 4]
    assert made.train.offsets.tolist() == [0, 3, 4, 4]
    assert made.train.labels.tolist() == [2, 0, 2]
    assert made.test.tokens.tolist() == [1, 1, 1, 1]
    assert made.test.labels.tolist() == [1]
    assert made.train.pad == 9


def test_tokens_are_made_once_per_machine() -> None:
    first, second = Words(), Words()
    made = make(first)
    again = make(second)
    assert (first.calls, second.calls) == (2, 0)
    for one, other in ((made.train, again.train), (made.test, again.test)):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.offsets, other.offsets)
        np.testing.assert_array_equal(one.labels, other.labels)


def test_cached_tokens_are_those_of_this_text_tokenizer_and_length() -> None:
    make(Words())
    other_length, other_tokenizer, other_text = Words(), Words("others"), Words()
    assert make(other_length, length=5).test.tokens.tolist() == [1, 1, 1, 1, 1]
    make(other_tokenizer)
    train = Texts(["a bb", "ccc dddd", ""], TEXTS[0].labels)
    assert make(other_text, (train, TEXTS[1])).train.offsets.tolist() == [0, 2, 4, 4]
    assert (other_length.calls, other_tokenizer.calls, other_text.calls) == (2, 2, 1)


def test_other_labels_are_not_taken_from_the_cache() -> None:
    make(Words())
    train = Texts(TEXTS[0].texts, ["green", "green", "blue"])
    made = make(Words(), (train, TEXTS[1]))
    assert made.train.labels.tolist() == [1, 1, 0]


def test_no_texts_make_no_examples() -> None:
    made = make(Words(), (TEXTS[0], Texts([], [])))
    assert (len(made.train), len(made.test)) == (3, 0)
