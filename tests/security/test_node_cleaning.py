"""What a run makes a node keep is removed when the run ends, and bounded until then."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from slora_flwr.client import keeping
from slora_flwr.client.handlers import HANDLERS
from slora_flwr.client.process import SharedContext, make_process
from slora_flwr.common.files import cache_folder, make_folder, run_folder
from slora_flwr.server import collect
from slora_flwr.server.fleet import END_SECONDS
from slora_flwr.server.run import run
from slora_flwr.wire.messages import END, MessageError, write_lineage
from tests.support.clock import Clock
from tests.support.grids import Grid
from tests.support.own_data import NodesGrid, make_own_data_config, nodes_of
from tests.support.resuming import InterruptionError, resumed
from tests.support.runs import (
    INT8,
    SLORA,
    TOP,
    Config,
    elsewhere,
    events,
    ledger,
    start,
    summary,
)


class Home:
    """Whose folder `$SLORA_HOME` is while a node or the server is at work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._patch, self.folder = monkeypatch, folder
        self.be("server")

    def be(self, who: str | int) -> None:
        self._patch.setenv("SLORA_HOME", str(self.folder / f"{who}"))

    def kept(self, node: int) -> list[Path]:
        """List what a node's runs have left."""
        cache = self.folder / f"{node}" / "cache"
        return [p for p in cache.glob("run-*/**/*") if p.is_file()]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    return Home(monkeypatch, tmp_path / "homes")


class HostsGrid(Grid):
    """Each node has a disk of its own."""

    def __init__(self, config: Config, home: Home) -> None:
        super().__init__(config, 2)
        self._home = home
        self.before_end: list[list[Path]] = []

    def _answer(self, message: Message) -> Message:
        at = message.metadata.dst_node_id
        if message.metadata.message_type == END:
            self.before_end.append(self._home.kept(at))
        self._home.be(at)
        try:
            return super()._answer(message)
        finally:
            self._home.be("server")


@pytest.fixture
def kept(config: Config) -> Config:
    """A run with bases and residuals."""
    return config | SLORA | INT8 | TOP | {"clients.per-round": 4}


def test_every_node_removes_what_it_kept_for_a_run_that_has_ended(
    kept: Config, home: Home
) -> None:
    grid = HostsGrid(kept, home)
    start(kept, grid)
    assert len(grid.before_end) == 2
    for files in grid.before_end:
        assert any(path.parent.name.isdecimal() for path in files)  # residuals
    # The nodes share a process, which keeps a base once.
    assert any(p.name.startswith("base-") for files in grid.before_end for p in files)
    assert home.kept(1) == home.kept(2) == []


def test_what_is_sent_at_the_end_is_in_no_file(
    kept: Config, home: Home, tmp_path: Path
) -> None:
    grid = HostsGrid(kept, home)
    directory = start(kept, grid)
    sent = sum(int(row["message_bytes"]) for row in ledger(directory))
    before = {path: path.read_bytes() for path in directory.rglob("*.*")}
    silent = elsewhere(kept)
    other = start(silent, SilentAtTheEnd(silent, home))
    assert sum(int(row["message_bytes"]) for row in ledger(other)) == sent
    names = [p.relative_to(other) for p in other.rglob("*.*")]
    assert sorted(names) == sorted(p.relative_to(directory) for p in before)
    assert all(not events(d, "left_out") for d in (directory, other))


class SilentAtTheEnd(HostsGrid):
    """Nobody answers once the run has ended."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return super().pull_messages(
            [i for i in message_ids if self._sent[i].metadata.message_type != END]
        )


@pytest.mark.parametrize("fails", [True, False])
def test_nodes_that_do_not_answer_do_not_hold_up_a_run_that_has_ended(
    kept: Config, home: Home, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    class Broken(SilentAtTheEnd):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            sent = list(messages)
            if fails and sent[0].metadata.message_type == END:
                raise ConnectionError("the SuperLink is gone")
            return super().push_messages(sent)

    clock = Clock()
    monkeypatch.setattr(collect, "time", clock)
    directory = start(kept, Broken(kept, home))
    assert summary(directory)["rounds"] == kept["rounds"]
    assert clock.now <= END_SECONDS + 1
    assert home.kept(2)  # which the bound on the cache takes care of


def test_a_run_that_stops_early_leaves_what_its_resuming_needs(
    kept: Config, home: Home
) -> None:
    class Stopping(HostsGrid):
        def _answer(self, message: Message) -> Message:
            reply = super()._answer(message)
            if self.asked and self.asked[-1].server_round == 3:
                raise InterruptionError
            return reply

    with pytest.raises(InterruptionError):
        start(kept, Stopping(kept, home))
    assert home.kept(1)
    assert home.kept(2)
    make_process.cache_clear()
    grid = HostsGrid(kept, home)
    directory = start(resumed(kept), grid)
    # The folder is that of the first run, so the base was not sent again.
    assert not any(asked.base_delta.start for asked in grid.asked)
    assert not events(directory, "failure")
    assert home.kept(1) == home.kept(2) == []


def context(lineage: int, **node_config: float) -> Context:
    made = Context(
        run_id=7,
        node_id=1,
        node_config=dict(node_config),
        state=RecordDict(),
        run_config={},
    )
    keeping.remember(made, lineage)
    return made


def end(content: RecordDict, of: Context) -> Message:
    return HANDLERS[END](Message(content, 1, END), of)


def leave(lineage: int) -> Path:
    make_folder(run_folder(lineage))
    path = run_folder(lineage) / "base-0"
    path.write_bytes(b"x" * 1000)
    return path


def test_runs_on_one_node_do_not_remove_each_others_files(home: Home) -> None:
    one, other, shared = leave(11), leave(12), cache_folder() / "tokens-0.safetensors"
    shared.write_bytes(b"x")
    assert not end(write_lineage(11), context(11)).has_error()
    assert not one.exists()
    assert other.exists()
    assert shared.exists()


@pytest.mark.parametrize("lineage", ["../..", "1/../12", "", "-1", 2**64, 1.5, b"12"])
def test_what_is_no_number_removes_nothing(home: Home, lineage: Any) -> None:
    left = leave(12)
    content = RecordDict({"config": ConfigRecord({"lineage": f"{lineage}"})})
    if not isinstance(lineage, str):
        content = RecordDict({"config": ConfigRecord({"lineage": lineage})})
    with pytest.raises((MessageError, OverflowError)):
        end(content, context(11))
    assert left.exists()


def test_a_nodes_cache_is_bounded_and_the_oldest_goes_first(home: Home) -> None:
    paths = [leave(lineage) for lineage in (14, 13, 12, 11)]
    for age, path in enumerate(paths):
        os.utime(path, (1000 - age, 1000 - age))
    keeping.limit(context(11))
    assert all(path.exists() for path in paths)
    keeping.limit(context(11, **{"cache-gigabytes": 2.5e-6}))
    assert [path.exists() for path in paths] == [True, True, False, False]


@pytest.mark.parametrize("given", ["much", -1.0, float("nan")])
def test_a_bound_that_is_none_is_one_clear_error(home: Home, given: Any) -> None:
    with pytest.raises(ValueError, match="cache-gigabytes in the node config is"):
        keeping.limit(context(11, **{"cache-gigabytes": given}))


@pytest.mark.parametrize("simulated", [True, False])
def test_messages_bound_the_cache_of_a_node_that_is_not_simulated(
    home: Home, kept: Config, simulated: bool
) -> None:
    left = leave(12)
    shape = SharedContext if simulated else Context
    asked = shape(
        run_id=7,
        node_id=1,
        node_config={"cache-gigabytes": 0, "allowed-folders": "/"},
        state=RecordDict(),
        run_config=dict(kept),
    )
    HANDLERS["query"](Message(write_lineage(11), 1, "query"), asked)
    assert left.exists() == simulated


def test_the_tokens_of_a_nodes_own_data_end_with_the_run(
    tmp_path: Path, tiny_models: dict[str, Path], home: Home
) -> None:
    """The texts can be read from them."""
    config = make_own_data_config(tmp_path, tiny_models["bert"])

    class Looking(NodesGrid):
        def _answer(self, message: Message) -> Message:
            if message.metadata.message_type == END:
                seen.append(len([*cache_folder().glob("run-*/tokens-*")]))
            return super()._answer(message)

    seen: list[int] = []
    grid = Looking(config, nodes_of(tmp_path))
    run(grid, config, 1, share=grid.share)
    assert seen[0] == 3
    assert not [*cache_folder().glob("run-*")]
