"""Runs whose processes are killed, or cannot write."""

import json
import multiprocessing
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slora_flwr.runs.checkpoint_files import (
    checkpoint_path,
    list_checkpoints,
    number_of,
)
from tests.support import interrupted
from tests.support.grids import Grid
from tests.support.processes import LONG
from tests.support.resuming import assert_same, content, resumed, stop
from tests.support.runs import (
    LOSSLESS,
    SLORA,
    TOP,
    Config,
    arguments,
    elsewhere,
    make_config,
    start,
)


@pytest.fixture
def config(config: Config) -> Config:
    return config | {"rounds": 4, "sparse.rounds": 2, "clients.per-round": 4}


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
        function: Callable[..., Any], *arguments: Any, seconds: float = LONG
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
        config |= MORTAL[name]
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
                    steps = draw.randint(1, 80)
                    code, _ = nursery(interrupted.carry_out, given, steps)
                if code != 0:
                    deaths.append(last_phase(directory))
            assert_same(directory, whole)
        config = elsewhere(config)
    assert len(deaths) >= 25
    assert {"sparse", "lora"} <= {*deaths}
    print(len(deaths), "deaths:", {phase: deaths.count(phase) for phase in deaths})


def last_phase(directory: Path) -> str:
    """Return the phase of the last round that was written down."""
    path = directory / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    phases = [json.loads(line).get("phase") for line in lines]
    return next(filter(None, reversed(phases)), "")


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
