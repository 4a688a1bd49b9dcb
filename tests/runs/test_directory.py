"""What a run writes down, and which directory it takes."""

import json
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from slora_flwr.config import ConfigError, flatten, parse
from slora_flwr.reports.page import render
from slora_flwr.reports.run_page import report
from slora_flwr.runs.reader import read_run
from slora_flwr.server.run import run
from slora_flwr.training.trainer import Trainer
from slora_flwr.wire.messages import Report
from tests.support.grids import RecordingGrid
from tests.support.runs import LAYERS, Config, events, facts, final, start, summary
from tests.support.tiny import CLASSES


def by_client(reports: list[Report], name: str) -> dict[int, Any]:
    return {
        client: value
        for report in reports
        for client, value in zip(report.clients, getattr(report, name), strict=True)
    }


def test_a_run_writes_what_it_was_and_what_came_of_it(two_phases: Config) -> None:
    grid = RecordingGrid(two_phases, nodes=2)
    directory = start(two_phases, grid)

    written = tomllib.loads((directory / "config.toml").read_text())
    flat: Config = {}
    for key, value in written.items():
        inner = value.items() if isinstance(value, dict) else [(None, value)]
        flat |= {f"{key}.{name}" if name else key: found for name, found in inner}
    expected = flatten(parse(two_phases))
    del expected["run.dir"]
    assert flat == expected
    facts = tomllib.loads((directory / "resolved.toml").read_text())
    versions, resolved = facts["versions"], facts["resolved"]
    assert facts["engine"] == {"name": "flwr", "nodes": 2}
    assert versions["flwr"] == version("flwr")
    assert versions["torch"] == version("torch")
    assert versions["python"].startswith("3.")
    assert len(resolved["backbone_digest"]) == 32
    assert resolved["classes"] == CLASSES
    assert resolved["train_examples"] + resolved["test_examples"] == 160
    assert resolved["phases"] == [
        {"adapter": "sparse", "rounds": 1, "lr": 0.01, "head_lr": 0.01},
        {"adapter": "lora", "rounds": 3, "lr": 0.002, "head_lr": 0.002},
    ]

    told = summary(directory)
    figures = {"accuracy", "macro_f1", "loss", "seconds"}
    counts = {f"{u}_bytes_{d}" for u in ("payload", "message") for d in ("up", "down")}
    assert told.keys() >= {"method", "rounds", "majority_accuracy"} | figures | counts
    assert (told["method"], told["rounds"]) == ("slora", 4)
    assert told["directory"] == str(directory)
    accuracies = [event["accuracy"] for event in events(directory, "round")]
    best = {"accuracy": max(accuracies), "round": accuracies.index(max(accuracies)) + 1}
    assert told["best"] == best
    assert list(told["phases"]) == ["sparse", "lora"]
    assert [p["rounds"] for p in told["phases"].values()] == [1, 3]
    for count in counts:
        assert told[count] == sum(p[count] for p in told["phases"].values()) > 0
    assert all(phase.keys() >= figures for phase in told["phases"].values())

    rounds = events(directory, "round")
    assert [(e["round"], e["phase"]) for e in rounds] == [
        (1, "sparse"),
        (2, "lora"),
        (3, "lora"),
        (4, "lora"),
    ]
    assert told["accuracy"] == rounds[-1]["accuracy"]
    assert told["phases"]["sparse"]["accuracy"] == rounds[0]["accuracy"]
    for event in rounds:
        of_round = [r for r in grid.reports if r.server_round == event["round"]]
        sizes = by_client(of_round, "examples")
        losses = by_client(of_round, "losses")
        found = event["clients"]
        assert {int(c): facts["examples"] for c, facts in found.items()} == sizes
        assert {int(c): facts["loss"] for c, facts in found.items()} == losses
        mean = sum(losses[c] * sizes[c] for c in sizes) / sum(sizes.values())
        assert event["train_loss"] == pytest.approx(mean)

    [handoff] = events(directory, "handoff")
    assert handoff["base"] == "residual"
    assert len(handoff["energies"]) == 6 * LAYERS
    assert all(0 < energy <= 1 for energy in handoff["energies"].values())


def test_a_loss_that_overflows_is_no_figure(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """All files stay JSON, which has no infinity."""
    config |= {"method": "head", "rounds": 1, "train.lr": 1.0, "server.lr": 3e38}
    directory = start(config, RecordingGrid(config))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    written = (directory / "summary.json").read_text()
    told = json.loads(written, parse_constant=refuse)
    assert told["loss"] is told["phases"]["head"]["loss"] is None
    for line in (directory / "events.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    last = events(directory, "round")[-1]
    assert "accuracy" in last
    assert "loss" not in last
    checkpoint = facts(directory, "round-0001")["facts"]
    json.loads(checkpoint, parse_constant=refuse)
    assert "loss -" in capsys.readouterr().out
    assert render(report(read_run(directory)))


def test_checkpoints_hold_the_averaged_and_the_best_state(config: Config) -> None:
    config |= {"lora.lr": 0.02}
    directory = start(config, RecordingGrid(config))
    accuracies = [event["accuracy"] for event in events(directory, "round")]
    best = accuracies.index(max(accuracies)) + 1
    assert facts(directory, "last") == {"round": "3", "phase": "lora", "base": ""}
    assert facts(directory, "best") == {"round": str(best), "phase": "lora", "base": ""}
    trainer = Trainer(parse(config))
    trainer.model.attach(trainer.schedule[0])
    names = ("averaged", "best")
    found = [trainer.evaluate_test(final(directory, name)) for name in names]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].accuracy == pytest.approx(accuracies[-1])
    assert found[1].accuracy == pytest.approx(max(accuracies))


def test_a_directory_in_use_is_refused_before_any_client_is_asked(
    config: Config,
) -> None:
    directory = Path(str(config["run.dir"]))
    directory.mkdir()
    (directory / "notes.txt").write_text("mine")
    grid = RecordingGrid(config)
    with pytest.raises(ConfigError, match=r"run\.dir is .*new or empty folder"):
        run(grid, config, run_id=1)
    assert grid.asked == []
    assert [path.name for path in directory.iterdir()] == ["notes.txt"]
