"""With privacy, no client's label is in the classes, nor in the head's shape."""

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest

from slora_flwr.config import ConfigError, parse
from slora_flwr.data.data_sets import load_texts
from slora_flwr.engines.inline import InlineGrid
from slora_flwr.server.run import run
from slora_flwr.training.process_data import ProcessData
from tests.support.runs import Config, final
from tests.support.tiny import CLASSES

RARE = "rare"


@pytest.fixture
def config(config: Config, tmp_path: Path) -> Config:
    """Private, and one client's example has a label that no other has."""
    path = tmp_path / "one-more.csv"
    rows = Path(str(config["data.name"])).read_text()
    config |= {"rounds": 1, "data.name": str(path)}
    for i in range(20):
        path.write_text(f"{rows}w{10 + i} w7,{RARE}\n")
        train, test = load_texts(parse(config).data)
        if RARE in train.labels:
            break
    assert RARE not in test.labels
    private: Config = {"privacy.noise-multiplier": 1.0, "privacy.clip-norm": 1.0}
    return config | private | {"privacy.delta": 0.01}


def test_a_clients_own_label_is_in_no_released_file(config: Config) -> None:
    run(InlineGrid(config), config, 1, generator=np.random.default_rng(0))
    directory = Path(str(config["run.dir"]))
    told = json.loads((directory / "adapter" / "classes.json").read_text())
    assert told == CLASSES
    resolved = tomllib.loads((directory / "resolved.toml").read_text())["resolved"]
    assert resolved["classes"] == CLASSES
    for name in ("config.toml", "resolved.toml"):
        assert RARE not in (directory / name).read_text()
    assert final(directory)["classifier.weight"].shape[0] == len(CLASSES)


def test_classes_of_a_private_run_may_be_named(config: Config) -> None:
    """They are then the same whether or not anybody has them."""
    config["data.labels"] = f"{', '.join(CLASSES)}, {RARE}, nobody's"
    data = ProcessData(parse(config))
    assert data.classes == sorted([*CLASSES, RARE, "nobody's"])
    labels = data.tokenised.train.labels
    assert np.bincount(labels, minlength=5)[data.classes.index(RARE)] == 1
    assert np.bincount(labels, minlength=5)[data.classes.index("nobody's")] == 0


def test_named_classes_hold_those_of_the_test_data(config: Config) -> None:
    config["data.labels"] = ",".join(CLASSES[:2])
    with pytest.raises(ConfigError, match=r"data\.labels is .*such as clouds"):
        _ = ProcessData(parse(config)).tokenised


def test_without_privacy_all_labels_are_classes(config: Config) -> None:
    config |= {"privacy.noise-multiplier": 0.0, "privacy.clip-norm": 0.0}
    config["privacy.delta"] = 0.0
    assert ProcessData(parse(config)).classes == sorted([*CLASSES, RARE])


@pytest.mark.parametrize("count", [100, 200, 500])
def test_a_delta_of_one_over_n_is_refused(config: Config, count: int) -> None:
    config |= {"clients.count": count, "privacy.delta": 1 / count}
    with pytest.raises(ConfigError, match=r"privacy\.delta is .* and below "):
        parse(config)
