"""Splits of shared data that leave nothing to train on, or nothing unseen."""

import csv
from pathlib import Path

import pytest

from slora_flwr.config import ConfigError
from slora_flwr.engines.inline import InlineGrid
from slora_flwr.server.run import run
from tests.support.grids import RecordingGrid
from tests.support.runs import Config, events, start


@pytest.mark.parametrize(
    ("share", "least", "empty"), [(0.999, 1, 6), (0.9, 5, 6), (0.8, 6, 3)]
)
def test_a_holdout_that_leaves_too_few_clients_is_refused_before_round_1(
    config: Config, tmp_path: Path, share: float, least: int, empty: int
) -> None:
    config["data.name"] = few_rows(tmp_path)
    config |= {"clients.holdout": share, "clients.min-replies": least}
    grid = RecordingGrid(config)
    told = f"clients.holdout is {share}; .*{empty} of 6 clients have nothing left to"
    with pytest.raises(ConfigError, match=told):
        run(grid, config, 1)
    assert not grid.queried


def test_clients_whose_holdout_leaves_nothing_are_counted_once(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config["data.name"] = few_rows(tmp_path)
    config |= {"clients.holdout": 0.8, "rounds": 2}
    directory = start(config, RecordingGrid(config))
    told = "clients.holdout leaves 3 of 6 clients nothing to train on"
    assert [r.getMessage() for r in caplog.records].count(told) == 1
    assert [event["replied"] for event in events(directory, "round")] == [3, 3]


def few_rows(folder: Path) -> str:
    """Return a file of which a fifth is for tests, and 15 rows for six clients."""
    path = folder / "few.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows((f"w{i + 5}", "ab"[i % 2]) for i in range(19))
    return str(path)


@pytest.mark.parametrize("same", [0, 7])
def test_texts_of_the_test_data_that_are_trained_on_are_counted(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture, same: int
) -> None:
    train = [(f"w{i + 5} w{i + 6}", "ab"[i % 2]) for i in range(40)]
    test = train[:same] + [(f"w{i + 5}", "ab"[i % 2]) for i in range(10)]
    folder = tmp_path / "data"
    folder.mkdir()
    for name, texts in (("train", train), ("test", test)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            rows.writerows(texts)
    config |= {"data.name": str(folder), "data.test": "test", "rounds": 1}
    run(InlineGrid(config, 1), config, 1)
    told = f"data.test: {same} of {same + 10} texts are trained on too"
    assert (told in caplog.text) == bool(same)
    assert ("are trained on too" in caplog.text) == bool(same)
