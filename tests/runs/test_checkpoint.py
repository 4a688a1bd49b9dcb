"""What is kept of a run, damage to it, and what is refused."""

import math
import os
from logging import WARNING
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slora_flwr.config import ConfigError, parse
from slora_flwr.runs import checkpoint
from slora_flwr.runs.checkpoint import (
    DamagedError,
    find_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from slora_flwr.runs.checkpoint_files import (
    checkpoint_path,
    list_checkpoints,
    number_of,
)
from slora_flwr.runs.snapshot import Snapshot, to_bytes, to_tensor
from slora_flwr.server.run import run
from tests.support.grids import Grid
from tests.support.resuming import assert_same, content, go_on, resumed, stop
from tests.support.runs import (
    SLORA,
    TOP,
    Config,
    differ,
    elsewhere,
    events,
    facts,
    final,
    start,
    summary,
)


@pytest.fixture
def config(config: Config) -> Config:
    return config | {"rounds": 4, "sparse.rounds": 2, "clients.per-round": 4}


def test_the_last_and_the_best_checkpoints_are_kept(config: Config) -> None:
    config |= {"run.keep": 3, "rounds": 6, "lora.lr": 1e-9}
    directory = start(config, Grid(config))
    # Nothing is learned, so that the first round is the best.
    assert [number_of(p) for p in list_checkpoints(directory)] == [1, 4, 5, 6]
    assert facts(directory, "best")["round"] == "1"


def test_a_checkpoint_is_no_pickle_and_private(config: Config) -> None:
    config |= {"rounds": 1}
    directory = start(config, Grid(config))
    path = checkpoint_path(directory, 1)
    assert path.stat().st_mode & 0o077 == 0
    assert not differ(
        {
            name.removeprefix("phase/state/"): tensor
            for name, tensor in load_file(path).items()
        },
        final(directory),
    )


def test_a_snapshot_comes_back_as_it_was(tmp_path: Path) -> None:
    tensors = {
        "z": torch.tensor([1.5, -math.inf, math.nan]),
        "a": torch.tensor(3.0),
        "m": torch.tensor([[1, 2], [3, 4]]).T,
        "none": torch.empty(0, 3),
        "raw": to_tensor(b"\x00\xff"),
    }
    part = Snapshot({"loss": 0.1, "none": None, "held": [[7, "x"]]}, tensors)
    write_checkpoint(tmp_path / "x", Snapshot.join({"one": part, "two": Snapshot()}))
    read = read_checkpoint(tmp_path / "x")
    assert read.part("one").facts == part.facts
    assert [*read.part("one").tensors] == [*tensors]
    for name, tensor in read.part("one").tensors.items():
        assert tensor.dtype == tensors[name].dtype
        torch.testing.assert_close(
            tensor, tensors[name], rtol=0, atol=0, equal_nan=True
        )
    assert to_bytes(read.part("one").tensors["raw"]) == b"\x00\xff"
    assert read.part("two") == Snapshot()


# What is refused


def refusal(config: Config, grid: Grid | None = None) -> str:
    grid = grid or Grid(config)
    with pytest.raises(ConfigError) as caught:
        run(grid, resumed(config), 1)
    assert grid.asked == []
    return str(caught.value)


def test_another_config_is_refused_by_key_with_both_values(config: Config) -> None:
    directory = stop(config, 2)
    before = content(directory)
    text = refusal(config | {"lora.rank": 3, "train.lr": 0.5, "run.keep": 7})
    assert f"run.resume is {str(directory)!r}" in text
    assert "lora.rank is 4 there and 3 here" in text
    assert "train.lr is 0.0 there and 0.5 here" in text
    assert "run.keep is" not in text
    assert content(directory) == before


def test_a_run_without_a_newer_key_had_its_default(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop(config, 2)
    again = resumed(config)
    found = find_checkpoint(parse(again))
    lacking = dict(found.facts["config"])
    del lacking["train.head-lr"]
    older = Snapshot(found.facts | {"config": lacking}, found.tensors)
    monkeypatch.setattr(checkpoint, "read_checkpoint", lambda path: older)
    assert find_checkpoint(parse(again)) is older
    with pytest.raises(ConfigError, match=r"train\.head-lr is 0\.0 there and 0\.5"):
        find_checkpoint(parse(again | {"train.head-lr": 0.5}))


@pytest.mark.parametrize("key", ["outside-code", "backbone", "classes", "partition"])
def test_other_code_backbone_or_partition_is_refused(config: Config, key: str) -> None:
    directory = stop(config, 2)
    [path] = list_checkpoints(directory)
    kept = read_checkpoint(path)
    here = kept.facts["identity"].get(key)
    kept.facts["identity"][key] = "beef"
    write_checkpoint(path, kept)
    before = content(directory)
    assert f"{key} is 'beef' there and {here!r} here" in refusal(config)
    assert content(directory) == before


def test_another_format_is_refused(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    [path] = list_checkpoints(stop(config, 2))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", "1")
        write_checkpoint(path, Snapshot({"other": "facts"}))
    text = refusal(config)
    assert f"{path} is of format 1; allowed: 2" in text


def test_what_cannot_matter_may_differ(config: Config) -> None:
    stop(config, 2)
    directory = go_on(
        config | {"run.keep": 9, "run.target": 0.1, "clients.deadline": 60.0}
    )
    assert "target" in summary(directory)
    assert len(list_checkpoints(directory)) == 4


def test_a_folder_that_is_no_run_is_refused(config: Config, tmp_path: Path) -> None:
    config |= {"run.dir": str(tmp_path / "none")}
    assert "which holds no whole checkpoint; allowed: the directory" in refusal(config)


def test_two_directories_are_refused(config: Config) -> None:
    config |= {"run.resume": "/elsewhere"}
    with pytest.raises(ConfigError, match=r"run\.dir is .*; allowed: empty, or run\.r"):
        run(Grid(config), config, 1)


# Damage


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def flip_the_facts(path: Path) -> None:
    data = path.read_bytes()
    assert data.count(rb"\"phase_round\": ") == 1
    at = data.index(rb"\"phase_round\": ") + len(rb"\"phase_round\": ")
    path.write_bytes(data[:at] + b"9" + data[at + 1 :])


def garble(path: Path) -> None:
    path.write_bytes(b"\xff" * 100)


@pytest.mark.parametrize("damage", [cut, empty, flip, flip_the_facts, garble])
def test_a_damaged_checkpoint_is_never_read(config: Config, damage: Any) -> None:
    config |= {"rounds": 1}
    directory = start(config, Grid(config))
    path = checkpoint_path(directory, 1)
    damage(path)
    with pytest.raises(DamagedError):
        read_checkpoint(path)
    assert "holds no whole checkpoint" in refusal(config)


@pytest.mark.parametrize("spoilt", ["checkpoint", "events.jsonl", "ledger.csv"])
def test_the_checkpoint_before_a_damaged_one_is_used(
    config: Config, spoilt: str, caplog: pytest.LogCaptureFixture
) -> None:
    config |= SLORA | TOP | {"upload.dtype": "int8", "run.keep": 1}
    whole = start(config, Grid(config))
    # With a best round before the last, so that there are two.
    config = elsewhere(config, **{"run.keep": 2})
    directory = stop(config, 4)
    if spoilt == "checkpoint":
        flip(checkpoint_path(directory, 3))
    else:
        size = read_checkpoint(checkpoint_path(directory, 2)).facts["sizes"][spoilt]
        os.truncate(directory / spoilt, size)
    with caplog.at_level(WARNING, logger="flwr"):
        go_on(config | {"run.keep": 1})
    assert "round-0003.safetensors is skipped for the one before it" in caplog.text
    assert [e["round"] for e in events(directory, "resumed")] == [2]
    assert_same(directory, whole)
