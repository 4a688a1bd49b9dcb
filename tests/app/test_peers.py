"""The benchmark against other frameworks: its sides do the same work."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"


def test_sides_have_the_same_losses_without_dropout() -> None:
    sides = ("slora-flwr", "plain", "usual-recipe")
    command = [sys.executable, str(PEERS / "compare.py"), "--check"]
    command += ["--model", "embedded", "--examples", "20", "--peers", *sides]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout.splitlines()[-1])["losses"]
    first, second = found["plain"]
    assert second < first
    assert found["slora-flwr"] == pytest.approx([first, second], rel=1e-6)
    assert found["usual-recipe"] == pytest.approx([first, second], rel=1e-6)


def test_a_ratio_is_of_rounds_in_the_same_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PEERS))
    from compare import write_page

    def side(name: str, own: bool, *cpu: float) -> dict[str, Any]:
        turns = [{"cpu": seconds, "wall": 2 * seconds} for seconds in cpu]
        told = {"name": name, "version": "", "own": own, "losses": [2.0, 1.5]}
        return {**told, "turns": turns}

    entry: dict[str, Any] = {
        "machine": {
            "date": "2026-01-01",
            "processor": "a processor",
            "cores": 2,
            "load": 0.0,
            "system": "Linux",
            "python": "3.11",
        },
        "versions": {"torch": "1", "transformers": "1", "peft": "1"},
        "model": "embedded",
        "recipe": {
            "examples": 8,
            "clients": 10,
            "length": 32,
            "precision": "float32",
            "runs": 3,
        },
        "agree": 0.0,
        "sides": {
            "slora-flwr": side("slora-flwr", True, 1.0, 6.0, 2.0),
            "other": side("other", False, 2.0, 8.0, 10.0),
        },
        "absent": {},
    }
    [row] = [line for line in write_page([entry]).splitlines() if "| other" in line]
    ratio = "0.50 (0.20 to 0.75)"  # of 1 / 2, 6 / 8 and 2 / 10
    assert row == f"| other | 8.00 | 16.00 | {ratio} | {ratio} | 1.5000 |"
