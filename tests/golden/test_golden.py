"""What runs of many configs send and write, against facts that are kept beside this.

`facts.json` holds what is the same on every machine: the layout of messages and the
bytes of payloads, bytes by round and direction as planned and as sent, cohorts and
examples, and of states and exports the tensors' names, dtypes and shapes, with a digest
of masks' positions. The last bits of trained values are not in it, since they depend on
the CPU and on the number of threads, but losses are, which are compared roughly. That a
run repeats its own to the bit is tested by `server/test_rounds.py` and, over processes,
by `app/test_killed.py`.

Facts that change tell of a version whose nodes and checkpoints do not fit those of the
version before. So a change that is meant raises the protocol. Then
`run_configs.py --stable` writes the file anew; it overwrites no others.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slora_flwr.common.protocol import PROTOCOL
from tests.golden import run_configs
from tests.golden.run_configs import RAISE, list_differences, main, must_raise
from tests.golden.wire import digest_payloads, list_whole_messages

FOLDER = Path(__file__).parent
KEPT = json.loads((FOLDER / "facts.json").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("golden") / "facts.json"
    # A process of its own: runs are forked from it, which pytest's threads forbid.
    command = [sys.executable, "-m", "tests.golden.run_configs", *KEPT["runs"]]
    command += ["--stable", "--out", str(path)]
    subprocess.run(command, check=True, cwd=FOLDER.parents[1])
    return json.loads(path.read_text())


def test_the_facts_are_of_this_protocol() -> None:
    assert KEPT["protocol"] == PROTOCOL, "write the facts anew"


@pytest.mark.parametrize("name", KEPT["runs"])
def test_a_run_sends_and_writes_what_it_did(found: Any, name: str) -> None:
    assert [*list_differences(KEPT["runs"][name], found["runs"][name])] == [], RAISE


@pytest.mark.parametrize("name", ["layouts", "messages", "payloads"])
def test_files_and_messages_hold_what_they_did(found: Any, name: str) -> None:
    assert [*list_differences(KEPT[name], found[name])] == [], RAISE


# Without a run


def test_payloads_and_whole_messages_are_what_they_were() -> None:
    assert digest_payloads() == KEPT["payloads"], RAISE
    whole = [line for line in KEPT["messages"] if line.startswith("whole ")]
    assert sorted(list_whole_messages()) == whole, RAISE


def change_losses(facts: Any, by: float) -> None:
    facts["runs"]["slora"]["losses"][0][0] *= 1 + by


def test_changed_facts_take_a_new_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "facts.json"
    text = json.dumps(KEPT)
    path.write_text(text)
    facts = json.loads(text)
    monkeypatch.setattr(run_configs, "run_cases", lambda names: {})
    monkeypatch.setattr(run_configs, "keep_stable", lambda _: facts)
    monkeypatch.setattr(sys, "argv", ["run_configs", "--stable", "--out", str(path)])
    facts["messages"].append("train up: config/new ConfigRecord str")
    assert main() == 1
    assert RAISE in capsys.readouterr().out
    assert path.read_text() == text
    facts["protocol"] += 1
    assert main() == 0
    assert json.loads(path.read_text()) == facts


def test_other_last_bits_new_runs_and_exports_take_none() -> None:
    facts = json.loads(json.dumps(KEPT))
    facts["runs"]["new"] = facts["runs"]["slora"]
    change_losses(facts, 1e-5)
    facts["runs"]["slora"]["files"]["adapter/new.safetensors"] = "0"
    assert must_raise(KEPT, facts) == []
    change_losses(facts, 1e-2)
    [difference] = must_raise(KEPT, facts)
    assert difference.startswith("/runs/slora/losses/0/0: ")
