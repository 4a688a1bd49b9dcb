"""`slora node check` and `slora node log`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from slora_flwr.cli import app
from slora_flwr.common.code_digest import code_digest
from slora_flwr.policy.audit import LOG, append, read_log
from slora_flwr.policy.ledger import Ledger
from slora_flwr.policy.policy import Most
from slora_flwr.privacy.accountant import Release


def slora(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["node", *map(str, arguments)])


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(
        'methods = ["lora", "slora"]\nmost = {bytes = 1000, epsilon = 8.0}\n'
        'ranges."train.epochs" = {most = 3}\n'
    )
    return path


def test_check_tells_what_is_allowed_and_used(policy: Path, tmp_path: Path) -> None:
    done = slora("check", "--policy", policy)
    assert done.exit_code == 0
    limits = [
        f"policy {policy}; code {code_digest()}",
        "methods              lora, slora",
        "most.bytes           1000",
        "most.epsilon         8.0",
        "ranges.train.epochs  up to 3",
    ]
    assert done.stdout.splitlines() == limits
    assert not (tmp_path / "state").exists()

    ledger = Ledger(tmp_path / "state", Most())
    ledger.add_bytes(1, 300)
    ledger.add_bytes(2, 40)
    ledger.reserve(2, 12.0)
    ledger.add_release(2, Release(1.0, 1e6, 1))
    done = slora("check", "--policy", policy)
    *known, used, spent = done.stdout.splitlines()
    assert known == limits
    assert used == "used by 2 runs: 340 bytes, 12 seconds"
    assert spent.startswith("epsilon spent: ")


def test_check_tells_whether_a_run_is_allowed(policy: Path) -> None:
    policy.write_text('methods = ["lora"]\nfewest.rounds = 20')
    done = slora("check", "--policy", policy, "-c", "method=lora", "rounds=20")
    assert done.exit_code == 0
    assert done.stdout.endswith("\nA run of this config is allowed.\n")
    done = slora("check", "--policy", policy, "-c", "method=fft")
    assert done.exit_code == 1
    assert done.stdout.splitlines()[-2:] == [
        "refused: methods of its policy: method is 'fft'; allowed: lora",
        "refused: fewest.rounds of its policy: rounds is 12; allowed: at least 20",
    ]
    policy.write_text(f'models = ["{"0" * 32}"]')
    done = slora("check", "--policy", policy, "-c", "method=fft")
    assert "weights have none of the digests" in done.stdout
    done = slora("check", "--policy", policy, "-c", "rounds=0")
    assert (done.exit_code, done.stderr.partition(";")[0]) == (2, "Error: rounds is 0")


def test_a_broken_policy_is_named(
    policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy.write_text("most.bytes = -1")
    monkeypatch.setenv("SLORA_POLICY", str(policy))
    told = f"policy {policy}: most.bytes is -1; allowed: a whole number of at least 0"
    for command in ("check", "log"):
        done = slora(command)
        assert (done.exit_code, done.stderr) == (2, f"Error: {told}\n")
    monkeypatch.delenv("SLORA_POLICY")
    assert "no policy is named" in slora("check").stderr


def test_log_tells_what_was_asked_and_where_the_chain_breaks(
    policy: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    append(state, {"event": "asked", "run": "5", "kind": "train", "server-round": 3})
    append(state, {"event": "answered", "run": "5", "kind": "train", "bytes": 12})
    append(state, {"event": "refused", "run": "5", "kind": "query", "reason": "why"})
    [*_, (_, second), (_, head)] = read_log(state)
    done = slora("log", "--policy", policy)
    assert done.exit_code == 0
    shown = [line.split(" ", 2) for line in done.stdout.splitlines()]
    assert [line[-1] for line in shown[:3]] == [
        "5 train asked server-round=3",
        "5 train answered bytes=12",
        "5 query refused reason=why",
    ]
    assert shown[3] == ["head", head]
    assert slora("log", "--state", state, "--head", second).exit_code == 0
    done = slora("log", "--state", state, "--head", "0" * 64)
    assert (done.exit_code, "it was written anew" in done.stderr) == (1, True)

    lines = (state / LOG).read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {"bytes": 11})
    (state / LOG).write_text("".join(f"{line}\n" for line in lines))
    done = slora("log", "--policy", policy)
    assert done.exit_code == 1
    assert "line 3 is not the one that followed line 2" in done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_the_log_holds_what_nobody_can_type(tmp_path: Path) -> None:
    append(tmp_path, {"event": "refused", "reason": "\x1b[2J\nline"})
    done = slora("log", "--state", tmp_path)
    assert r"reason=\x1b[2J\nline" in done.stdout


def test_a_folder_without_a_log_is_an_error(tmp_path: Path) -> None:
    done = slora("log", "--state", tmp_path)
    assert (done.exit_code, LOG in done.stderr) == (1, True)


@pytest.mark.parametrize("command", ["check", "log"])
def test_neither_waits_for_torch(policy: Path, tmp_path: Path, command: str) -> None:
    Ledger(tmp_path / "state", Most())
    append(tmp_path / "state", {"event": "asked"})
    code = "import sys; from slora_flwr.cli import app; "
    code += "app(sys.argv[1:], standalone_mode=False); "
    code += "assert 'torch' not in sys.modules"
    given = [sys.executable, "-c", code, "node", command, "--policy", str(policy)]
    subprocess.run(given, check=True, stdout=subprocess.DEVNULL)
