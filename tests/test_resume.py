"""Runs that are interrupted and go on: bit for bit, or not at all."""

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from logging import WARNING
from pathlib import Path
from typing import Any

import interrupted
import pytest
import torch
from conftest import CLASSES
from flwr.app import Message, MessageType
from safetensors.torch import load_file
from test_own_data import NodesGrid, nodes_of
from test_own_data import config as own_data_config  # noqa: F401
from test_rounds import (
    Config,
    differ,
    elsewhere,
    events,
    facts,
    final,
    ledger,
    make_config,
    start,
    summary,
)
from test_upload import INT8, LOSSLESS, RUN_IDS, TOP, Grid

from slora_flwr.client import handlers as node
from slora_flwr.client.residuals import Residuals
from slora_flwr.common.files import cache_folder
from slora_flwr.config import ConfigError
from slora_flwr.runs import checkpoint
from slora_flwr.runs.checkpoint import (
    DamagedError,
    checkpoint_path,
    list_checkpoints,
    number_of,
    read_checkpoint,
    write_checkpoint,
)
from slora_flwr.runs.snapshot import Snapshot, to_bytes, to_tensor
from slora_flwr.server.run import run


@pytest.fixture
def config(corpus: Path, tiny_models: dict[str, Path], tmp_path: Path) -> Config:
    config = make_config(corpus, tiny_models["bert"], tmp_path / "run")
    return config | {"rounds": 4, "sparse.rounds": 2, "clients.per-round": 4}


class InterruptionError(Exception):
    """What ends a run before its end."""


class StoppingGrid(Grid):
    """Its run is interrupted in a round, once the first node has trained."""

    def __init__(self, config: Config, last: int, nodes: int = 2) -> None:
        super().__init__(config, nodes)
        self._last = last

    def _answer(self, message: Message) -> Message:
        reply = super()._answer(message)
        if (
            message.metadata.message_type == MessageType.TRAIN
            and not reply.has_error()
            and self.asked[-1].server_round == self._last
        ):
            raise InterruptionError
        return reply


def resumed(config: Config) -> Config:
    """The same run, which goes on where it is."""
    return config | {"run.resume": config["run.dir"]}


def stop(config: Config, last: int) -> Path:
    """Interrupt a run in its round `last`."""
    node._worker.cache_clear()  # another process has none
    with pytest.raises(InterruptionError):
        start(config, StoppingGrid(config, last))
    return Path(str(config["run.dir"]))


def go_on(config: Config, nodes: int = 2) -> Path:
    node._worker.cache_clear()
    return start(resumed(config), Grid(config, nodes))


def without(figures: dict[str, Any], *others: str) -> dict[str, Any]:
    """Leave out what depends on the clock, or on what processes still have."""
    left_out = {"seconds", "took", "message_bytes", *others}
    left_out |= {"message_bytes_up", "message_bytes_down"}
    return {
        name: without(value) if isinstance(value, dict) else value
        for name, value in figures.items()
        if name not in left_out
    }


def files(directory: Path) -> dict[str, Any]:
    """Give what was exported."""
    found: dict[str, Any] = {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for folder in ("adapter", "model")
        for path in sorted((directory / folder).rglob("*"))
    }
    if written := found.get("adapter/adapter_config.json"):
        read = json.loads(written)
        # PEFT keeps them as a set, whose order is another in another process.
        found["adapter/adapter_config.json"] = read | {
            "target_modules": sorted(read["target_modules"])
        }
    return found


def assert_same(directory: Path, expected: Path) -> None:
    """Compare two run directories in all that is promised."""
    names = {path.name for path in (expected / "checkpoints").iterdir()}
    assert {path.name for path in (directory / "checkpoints").iterdir()} == names
    for name in {"last", "best", "base", "best-base"} & {Path(n).stem for n in names}:
        assert facts(directory, name) == facts(expected, name)
        one, other = final(directory, name), final(expected, name)
        assert one.keys() == other.keys()
        assert not differ(one, other), name
    for path in list_checkpoints(expected):
        one = read_checkpoint(directory / "checkpoints" / path.name).tensors
        other = read_checkpoint(path).tensors
        assert [*one] == [*other]
        assert not differ(one, other), path.name
    for kind in ("round", "handoff"):
        found = [without(event) for event in events(directory, kind)]
        for event, other_event in zip(found, events(expected, kind), strict=True):
            for client in event.get("clients", {}):
                assert event["clients"][client]["loss"] > 0
            assert event == without(other_event)
    # Rows without clients are messages that were sent again.
    rows = [
        [without(row) for row in ledger(d) if row["clients"] != "0"]
        for d in (directory, expected)
    ]
    assert rows[0] == rows[1]
    assert without(summary(directory)) == without(summary(expected))
    assert files(directory) == files(expected) != {}
    assert events(directory, "failure") == []


# After each round


SLORA: Config = {"method": "slora"}
CASES: dict[str, Config] = {
    "slora": SLORA,
    "per-round": SLORA | INT8 | LOSSLESS | {"sparse.schedule": "per-round"},
    "fedex-lora": {"method": "fedex-lora", "rounds": 3},
    "exact": SLORA | INT8 | {"lora.aggregator": "exact", "clients.holdout": 0.2},
    "flexlora": {"method": "flexlora", "lora.ranks": "4, 2", "rounds": 3},
    "fedadam": SLORA
    | {"server.optimizer": "fedadam", "server.lr": 0.01, "lora.base": "w0"},
    "fedavgm": TOP | {"method": "alternate-lora", "server.optimizer": "fedavgm"},
    # Nothing is gained, so that it ends in round 4 of at most 5.
    "open": SLORA | {"sparse.rounds": 0, "rounds": 10, "sparse.lr": 1e-9},
    "coded": SLORA | TOP | LOSSLESS | {"upload.dtype": "int4"},
    "ffa": INT8
    | LOSSLESS
    | {"method": "ffa-lora", "lora.start": "orthonormal", "rounds": 3},
    "fft": TOP | LOSSLESS | {"method": "fft", "run.eval-every": 0, "rounds": 3},
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_is_stopped_after_each_round_ends_as_if_it_were_not(
    config: Config, name: str
) -> None:
    config |= CASES[name]
    first, *others = range(2, int(config["rounds"]) + 1)
    if name == "open":
        first, *others = 3, 5, 6
    whole = start(config, Grid(config, nodes=3))
    config = elsewhere(config)
    stop(config, first)
    for last in others:
        stop(resumed(config), last)
    directory = go_on(config)
    resumptions = [event["round"] for event in events(directory, "resumed")]
    assert resumptions == [last - 1 for last in (first, *others)]
    assert_same(directory, whole)
    if name == "open":
        phases = [event["phase"] for event in events(directory, "round")]
        assert phases == ["sparse"] * 4 + ["lora"] * 6


def test_a_run_that_has_ended_goes_on_to_the_same_end(config: Config) -> None:
    config |= SLORA
    whole = start(config, Grid(config))
    config = elsewhere(config)
    start(config, Grid(config))
    directory = Path(str(config["run.dir"]))
    shutil.rmtree(directory / "adapter")
    (directory / "summary.json").unlink()
    grid = Grid(config)
    start(resumed(config), grid)
    assert grid.asked == []
    assert_same(directory, whole)


def test_seconds_go_on(config: Config) -> None:
    directory = stop(config, 3)
    before = [event["seconds"] for event in events(directory, "round")]
    go_on(config)
    after = [event["seconds"] for event in events(directory, "round")]
    assert after[:2] == before
    assert after == sorted(after)
    assert events(directory, "resumed")[0]["seconds"] >= before[-1]
    assert summary(directory)["seconds"] >= after[-1]


def test_what_was_written_after_the_checkpoint_is_cut_off(config: Config) -> None:
    directory = stop(config, 3)
    assert len(events(directory, "stopped")) == 1
    with (directory / "events.jsonl").open("a") as file:
        file.write('{"event": "rou')
    with (directory / "ledger.csv").open("a") as file:
        file.write("3,lora,up,4")
    (directory / "checkpoints" / "last.safetensors.f00.part").write_bytes(b"half")
    go_on(config)
    kinds = [
        json.loads(line)["event"]
        for line in (directory / "events.jsonl").read_text().splitlines()
    ]
    assert kinds == ["round", "round", "resumed", "round", "round"]
    assert [row["round"] for row in ledger(directory)] == [*"11223344"]
    assert not list(directory.rglob("*.part"))


# What is kept


def test_the_last_and_the_best_checkpoints_are_kept(config: Config) -> None:
    config |= {"run.keep": 3, "rounds": 6, "lora.lr": 1e-9}
    directory = start(config, Grid(config))
    # Nothing is learned, so that the first round is the best.
    assert [number_of(p) for p in list_checkpoints(directory)] == [1, 4, 5, 6]
    assert facts(directory, "best")["round"] == "1"


def test_a_checkpoint_is_no_pickle_and_private(config: Config) -> None:
    directory = start(config | {"rounds": 1}, Grid(config))
    path = checkpoint_path(directory, 1)
    assert path.stat().st_mode & 0o077 == 0
    assert not differ(
        {
            name.removeprefix("strategy/"): tensor
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


def content(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_another_config_is_refused_by_key_with_both_values(config: Config) -> None:
    directory = stop(config, 2)
    before = content(directory)
    text = refusal(config | {"lora.rank": 3, "train.lr": 0.5, "run.keep": 7})
    assert f"run.resume is {str(directory)!r}" in text
    assert "lora.rank is 4 there and 3 here" in text
    assert "train.lr is 0.0 there and 0.5 here" in text
    assert "run.keep is" not in text
    assert content(directory) == before


@pytest.mark.parametrize("key", ["version", "code", "backbone", "classes", "partition"])
def test_another_code_backbone_or_partition_is_refused(
    config: Config, key: str
) -> None:
    directory = stop(config, 2)
    [path] = list_checkpoints(directory)
    kept = read_checkpoint(path)
    here = kept.facts["identity"][key]
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
        patch.setattr(checkpoint, "FORMAT", "2")
        write_checkpoint(path, Snapshot({"other": "facts"}))
    text = refusal(config)
    assert f"{path} is of format 2; allowed: 1" in text


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
    assert "round-0003.safetensors is not used, but the one before" in caplog.text
    assert [e["round"] for e in events(directory, "resumed")] == [2]
    assert_same(directory, whole)


# Residuals


def test_residuals_are_kept_as_far_back_as_checkpoints() -> None:
    lineage = next(RUN_IDS)
    node_context = Grid({})._contexts[1]
    store = Residuals(node_context, lineage, 2, is_only_client=False)

    def kept_after(server_round: int, since: int) -> set[int]:
        store.keep(3, "", server_round, since, {"x": torch.ones(1)})
        return {n for n in range(20) if store.take(3, "", n)}

    for number, since in ((1, 0), (2, 1), (5, 2), (6, 5)):
        kept_after(number, since)
    # In round 9 a run may go back to the end of round 7: then 6 is the last one.
    assert kept_after(9, 6) == {6, 9}
    assert kept_after(10, 9) == {6, 9, 10}
    assert kept_after(11, 10) == {9, 10, 11}
    # Round 11 did not count, nor 13, nor 16: 10 is what all go on from.
    assert kept_after(13, 10) == {10, 13}
    assert kept_after(16, 10) == {10, 16}
    assert kept_after(19, 10) == {10, 19}


def test_a_repeated_round_starts_from_the_residual_before_it(config: Config) -> None:
    """Rounds whose update did not count leave none behind."""
    config |= {"upload.dtype": "int4", "clients.per-round": 6}
    first = StoppingGrid(config, 3)
    with pytest.raises(InterruptionError):
        start(config, first)
    lineage = first.run.run_id
    third = {
        path.parent.name
        for path in (cache_folder() / f"residuals-{lineage}").glob("*/3")
    }
    assert 0 < len(third) < 6
    grid = Grid(config, nodes=2)
    start(resumed(config), grid)
    assert {asked.lineage for asked in grid.asked} == {lineage}
    for asked in grid.asked:
        assert asked.residuals == [asked.server_round - 1] * len(asked.clients)


# Nodes' own data


def test_nodes_keep_their_numbers_and_labels(
    own_data_config: Config,  # noqa: F811
    tmp_path: Path,
) -> None:
    config = own_data_config

    class Stopping(NodesGrid):
        def _answer(self, message: Message) -> Message:
            if message.metadata.group_id == "2":
                raise InterruptionError
            return super()._answer(message)

    with pytest.raises(InterruptionError):
        run(Stopping(config, nodes_of(tmp_path)), config, 1)
    directory = Path(str(config["run.dir"]))
    kept = read_checkpoint(list_checkpoints(directory)[-1]).facts["agreed"]
    assert kept == {"classes": CLASSES, "clients": {"a": 0, "b": 1, "c": 2}}
    # All but the first are there again.
    others = nodes_of(tmp_path)
    del others["a"]
    config |= {"clients.min-nodes": 2}
    run(NodesGrid(config, others), resumed(config), 2)
    told = [(e["name"], e["client"]) for e in events(directory, "node")]
    assert told == [("a", 0), ("b", 1), ("c", 2), ("b", 1), ("c", 2)]
    assert [e["cohort"] for e in events(directory, "round")] == [
        [0, 1, 2],
        *2 * [[1, 2]],
    ]


# Death

# Makes a run, or a command, in a process of its own: its exit status, and the answer.
Nursery = Callable[..., tuple[int, Any]]


@pytest.fixture(scope="module")
def nursery(
    corpus: Path,
    tiny_models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Nursery]:
    folder = tmp_path_factory.mktemp("nursery")
    config = make_config(corpus, tiny_models["bert"], folder / "run")
    config |= SLORA | {"rounds": 2, "clients.per-round": 2}
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(
        target=interrupted.nursery, args=(there, config, folder / "log")
    )
    process.start()
    there.close()

    def call(
        function: Callable[..., Any], *arguments: Any, seconds: float = 100.0
    ) -> tuple[int, Any]:
        here.send((function, arguments, seconds))
        code, answer = here.recv()
        assert code in (0, -signal.SIGKILL), (folder / "log").read_text()[-3000:]
        return code, answer

    yield call
    here.send(None)
    process.join()


MORTAL: dict[str, Config] = {
    "coded": SLORA | TOP | LOSSLESS | {"upload.dtype": "int4"},
    "moving": SLORA | {"sparse.schedule": "per-round", "lora.aggregator": "exact"},
}


def test_a_run_that_is_killed_anywhere_ends_as_if_it_were_not(
    config: Config, nursery: Nursery
) -> None:
    """Processes die by SIGKILL, at random times and at random steps of writing."""
    draw = random.Random(0)
    deaths: list[str] = []
    for name in MORTAL:
        config |= MORTAL[name] | {"rounds": 6, "sparse.rounds": 3}
        whole = Path(str(config["run.dir"]))
        begun = time.monotonic()
        assert nursery(interrupted.carry_out, config)[0] == 0
        seconds = time.monotonic() - begun
        wanted = len(deaths) + 13
        while len(deaths) < wanted:
            config = elsewhere(config)
            directory = Path(str(config["run.dir"]))
            code = None
            while code != 0:
                given = config
                if list_checkpoints(directory):
                    given = resumed(config)
                else:  # it died in its first round
                    shutil.rmtree(directory, ignore_errors=True)
                if draw.random() < 0.5:
                    most = draw.uniform(0.1, 0.9) * seconds
                    code, _ = nursery(interrupted.carry_out, given, seconds=most)
                else:
                    steps = draw.randint(1, 120)
                    code, _ = nursery(interrupted.carry_out, given, steps)
                if code != 0:
                    deaths.append(last_phase(directory))
            assert_same(directory, whole)
        config = elsewhere(config)
    assert len(deaths) >= 25
    assert {"sparse", "lora"} <= {*deaths}
    print(len(deaths), "deaths:", {phase: deaths.count(phase) for phase in deaths})


def last_phase(directory: Path) -> str:
    """Give the phase of the last round that was written down."""
    path = directory / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    phases = [json.loads(line).get("phase") for line in lines]
    return next(filter(None, reversed(phases)), "")


# A run directory that cannot be written


def arguments(config: Config) -> list[str]:
    pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    return ["run", "--engine", "inline", "--nodes", "2", "-c", pairs]


def test_a_full_disk_ends_the_run_and_not_its_checkpoints(
    config: Config, nursery: Nursery
) -> None:
    config |= SLORA
    whole = start(config, Grid(config))
    config = elsewhere(config)
    directory = stop(config, 3)
    limit = checkpoint_path(directory, 2).stat().st_size + 1000
    # The low-rank phase's files are larger than the sparse one's.
    assert limit < (whole / "checkpoints" / "base.safetensors").stat().st_size
    given = arguments(resumed(config))
    _, (code, output) = nursery(interrupted.command, given, limit)
    assert code == 1
    assert f"Error: the run directory {directory} cannot be written" in output
    assert "File too large" in output
    assert not list(directory.rglob("*.part"))
    assert [number_of(path) for path in list_checkpoints(directory)][-1] == 2
    _, (code, output) = nursery(interrupted.command, given)
    assert code == 0, output
    assert_same(directory, whole)


def test_a_read_only_run_directory_is_named(config: Config, nursery: Nursery) -> None:
    directory = stop(config, 2)
    before = content(directory)
    inside = [directory, *directory.rglob("*")]
    for path in inside:
        path.chmod(0o555 if path.is_dir() else 0o444)
    _, (code, output) = nursery(interrupted.command, arguments(resumed(config)))
    assert code == 1, output
    assert f"the run directory {directory} cannot be written" in output
    config |= {"run.dir": str(directory / "other")}
    _, (code, output) = nursery(interrupted.command, arguments(config))
    assert code == 2, output
    assert "run.dir is " in output
    assert "Permission denied" in output
    assert content(directory) == before
    for path in inside:
        path.chmod(0o700)
