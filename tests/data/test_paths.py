"""Paths that a run config names, made absolute where a command line gives them."""

from pathlib import Path

import pytest

from slora_flwr.config import Value
from slora_flwr.data.paths import make_absolute


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files and folders, some of which are called like data sets."""
    (tmp_path / "assets" / "data" / "known").mkdir(parents=True)
    (tmp_path / "assets" / "models" / "known").mkdir(parents=True)
    here = tmp_path / "here"
    for name in ("folder", "known", "20newsgroups", "embedded", "node", "own/model"):
        (here / name).mkdir(parents=True)
    for name in ("texts.csv", "train.csv", "folder/train.csv", "train"):
        (here / name).touch()
    monkeypatch.setenv("SLORA_ASSETS", str(tmp_path / "assets"))
    monkeypatch.chdir(here)
    return here


@pytest.mark.parametrize(
    "values",
    [
        {"data.name": "texts.csv"},
        {"data.name": "./folder"},
        {"data.name": "../here/texts.csv"},
        {"model.name": "own/model"},
        {"run.dir": "new"},
        {"run.resume": "folder"},
        {"data.name": "owner/name", "data.test": "absent.csv"},
        {"data.name": "news-category", "data.train": "train.csv"},
        {"data.name": "node", "data.train": "node{}.csv"},
        {"data.name": "node", "data.test": "train"},
    ],
    ids=str,
)
def test_paths_are_those_below_the_current_folder(
    here: Path, values: dict[str, Value]
) -> None:
    [*_, key] = values
    expected = values | {key: str(here / str(values[key]))}
    assert make_absolute(values | {"rounds": 3}) == expected | {"rounds": 3}


@pytest.mark.parametrize(
    "values",
    [
        {"data.name": "20newsgroups"},
        {"data.name": "stdlib-docs"},
        {"data.name": "known"},
        {"data.name": "owner/name"},
        {"data.name": "absent.csv"},
        {"data.name": "~/texts.csv"},
        {"data.name": "a\0b"},
        {"data.name": "a" * 5000},
        {"data.name": ""},
        {"data.name": 3},
        {"model.name": "embedded"},
        {"model.name": "known"},
        {"data.name": "known", "data.train": "train.csv"},
        {"data.name": "owner/name", "data.train": "train"},
        {"data.train": "train.csv"},  # of a study's data, which may be a folder
        {"data.name": "node", "data.train": ""},
        {"run.dir": ""},
        {"run.dir": "~/runs"},
        {"run.dir": "/runs"},
        {"run.resume": "https://user:password@example.org/run"},  # refused elsewhere
    ],
    ids=lambda values: str(values)[:40],
)
def test_what_is_no_path_here_stays_as_it_is(values: dict[str, Value]) -> None:
    assert make_absolute(values) == values


def test_files_of_a_folder_stay_in_it(here: Path) -> None:
    given = {"data.name": "folder", "data.train": "train.csv"}
    expected = {"data.name": str(here / "folder"), "data.train": "train.csv"}
    assert make_absolute(given) == expected
