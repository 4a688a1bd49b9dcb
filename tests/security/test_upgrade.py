"""Versions side by side: nodes and checkpoints of other versions and protocols."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from flwr.app import Message, MessageType

import slora_flwr
from slora_flwr.client import description
from slora_flwr.common.protocol import PROTOCOL, installed_version
from slora_flwr.config import ConfigError
from slora_flwr.runs.checkpoint import read_checkpoint, write_checkpoint
from slora_flwr.runs.checkpoint_files import list_checkpoints
from slora_flwr.runs.events import NodeVersion, read_events
from slora_flwr.server.fleet import FleetError
from slora_flwr.server.run import run
from tests.support.forks import ROOT
from tests.support.grids import Grid
from tests.support.resuming import assert_same, go_on, resumed, stop
from tests.support.runs import Config, arguments, elsewhere, events, start

GUIDE = ROOT / "docs" / "guides" / "backup-and-upgrade.md"


class MixedGrid(Grid):
    """Nodes of which the second describes itself otherwise."""

    def __init__(self, config: Config, nodes: int = 2, **told: str | int) -> None:
        super().__init__(config, nodes)
        self._told = told

    def _answer(self, message: Message) -> Message:
        reply = super()._answer(message)
        is_query = message.metadata.message_type == MessageType.QUERY
        if is_query and message.metadata.dst_node_id == 2:
            reply.content.config_records["config"].update(self._told)
        return reply


def test_a_node_of_another_version_and_the_same_protocol_trains(
    config: Config,
) -> None:
    whole = start(elsewhere(config), Grid(config, 2))
    grid = MixedGrid(config, version="99.0")
    directory = start(config, grid)
    assert set(grid.asked_nodes) == {1, 2}
    assert_same(directory, whole)
    assert events(directory, "left_out") == []
    # Told once, and read by those who read events.
    found = [
        event
        for event in read_events(directory / "events.jsonl")
        if isinstance(event, NodeVersion)
    ]
    assert [(e.node, e.name, e.version, e.server) for e in found] == [
        (2, "node 2", "99.0", installed_version())
    ]
    assert events(whole, "version") == []


def test_a_node_says_which_version_is_installed(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(description, "installed_version", lambda: "0.0.9")
    directory = start(config, Grid(config))
    assert [e["version"] for e in events(directory, "version")] == ["0.0.9"]


def test_a_node_of_another_protocol_is_left_out_by_name(config: Config) -> None:
    grid = MixedGrid(config, version="99.0", protocol=PROTOCOL + 1)
    directory = start(config, grid)
    assert set(grid.asked_nodes) == {1}
    [told] = events(directory, "left_out")
    assert told["name"] == "node 2"
    assert told["reason"] == (
        f"protocol is {PROTOCOL + 1}, the server's is {PROTOCOL}; version is '99.0', "
        f"the server's is {installed_version()!r}; upgrade the server"
    )


def test_a_node_from_before_protocols_is_told_to_be_upgraded(config: Config) -> None:
    class OldGrid(Grid):
        def _answer(self, message: Message) -> Message:
            reply = super()._answer(message)
            if message.metadata.message_type == MessageType.QUERY:
                del reply.content.config_records["config"]["protocol"]
            return reply

    wanted = f"protocol is None, the server's is {PROTOCOL}; upgrade the node"
    with pytest.raises(FleetError, match=wanted):
        start(config, OldGrid(config))


def test_a_checkpoint_of_another_protocol_is_refused(config: Config) -> None:
    [path] = list_checkpoints(stop(config, 2))
    kept = read_checkpoint(path)
    kept.facts["identity"]["protocol"] = 99
    write_checkpoint(path, kept)
    grid = Grid(config)
    with pytest.raises(ConfigError) as caught:
        run(grid, resumed(config), 1)
    assert f"a run of protocol 99; allowed: {PROTOCOL}, that of" in str(caught.value)
    assert "Resume it with a version of its protocol" in str(caught.value)
    assert grid.asked == []


def test_a_run_goes_on_from_a_restored_backup(config: Config, tmp_path: Path) -> None:
    whole = start(elsewhere(config), Grid(config, 2))
    [save] = re.findall(r"^tar .* -cf runs.tar .*", GUIDE.read_text(), re.MULTILINE)
    [restore] = re.findall(r"^tar .* -xpf runs.tar.*", GUIDE.read_text(), re.MULTILINE)
    before, after = (tmp_path / name for name in ("before", "after"))
    stop(config | {"run.dir": str(before / "runs" / "x")}, 2)
    after.mkdir()
    for command, home in (save, before), (restore, after):
        environment = os.environ | {"SLORA_HOME": str(home)}
        subprocess.run(command, shell=True, check=True, cwd=tmp_path, env=environment)
    shutil.rmtree(before)
    directory = go_on(config | {"run.dir": str(after / "runs" / "x")})
    assert_same(directory, whole)


def test_a_run_goes_on_with_changed_code_of_the_same_protocol(
    config: Config, tmp_path: Path
) -> None:
    whole = start(elsewhere(config), Grid(config, 2))
    stop(config, 2)
    # Another version: every file of the package has a comment more.
    site = tmp_path / "site"
    site.mkdir()
    package = Path(slora_flwr.__file__).parent
    shutil.copytree(package, site / "slora_flwr")
    for source in (site / "slora_flwr").rglob("*.py"):
        source.write_text(f"{source.read_text()}# A comment.\n")
    code = (
        "from pathlib import Path; import slora_flwr; from slora_flwr.cli import app; "
        "print(Path(slora_flwr.__file__).parents[1]); app()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments(resumed(config))],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{site}\n")
    assert_same(Path(str(config["run.dir"])), whole)
