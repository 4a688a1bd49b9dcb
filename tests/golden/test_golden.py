"""What runs of many configs send and write, against facts that are kept beside this.

`facts.json` holds what is the same on every machine: bytes by round and direction as
planned and as sent, cohorts and examples, and of states and exports the tensors' names,
dtypes and shapes, with a digest of masks' positions. The last bits of trained values
are not in it, since they depend on the CPU and on the number of threads; that a run
repeats its own to the bit is tested by `server/test_rounds.py` and, over processes, by
`app/test_killed.py`. Where a change is meant, `run_configs.py --stable` writes the file
anew.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.golden.run_configs import list_differences

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


@pytest.mark.parametrize("name", KEPT["runs"])
def test_a_run_sends_and_writes_what_it_did(found: Any, name: str) -> None:
    assert [*list_differences(KEPT["runs"][name], found["runs"][name])] == []


def test_files_hold_the_tensors_that_they_did(found: Any) -> None:
    assert [*list_differences(KEPT["layouts"], found["layouts"])] == []
