"""Studies: grids, tuned rates, runs that are made once and survive what others do."""

import csv
import fcntl
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import pytest
import tomli_w
from rich.console import Console
from typer.testing import CliRunner

from slora_flwr.cli import app
from slora_flwr.config import ConfigError
from slora_flwr.engines.inline import InlineGrid
from slora_flwr.runs.reader import is_run
from slora_flwr.runs.roster import ROSTER
from slora_flwr.server.export import read_state
from slora_flwr.server.run import run
from slora_flwr.studies import sweep as sweeping
from slora_flwr.studies.runner import Runner, StudyRun
from slora_flwr.studies.study import (
    Config,
    Score,
    Study,
    Trial,
    best_rate,
    digest_of,
    planned,
    read_study,
    tune,
)
from slora_flwr.studies.sweep import sweep
from slora_flwr.tasks.causal_lm import CausalLM
from slora_flwr.tasks.classification import Classification
from tests.support.causal import save_language_model, write_dialogues
from tests.support.processes import LONG, has_ended, wait_until

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SWEEP = [sys.executable, "-c", "from slora_flwr.cli import app; app()", "sweep"]


def study_of(folder: Path, text: str) -> Study:
    path = folder / "study.toml"
    path.write_text(text)
    return read_study(path)


# Grids


def test_a_grid_is_every_combination_of_its_values(tmp_path: Path) -> None:
    text = """
        [base]
        rounds = 9
        clients.count = 30
        [grid]
        method = ["lora", "fft"]
        clients.alpha = [0.5, 1]
        train.batch-size = 4
    """
    shared = {"rounds": 9, "clients.count": 30, "train.batch-size": 4}
    assert list(study_of(tmp_path, text).runs) == [
        shared | {"method": "lora", "clients.alpha": 0.5},
        shared | {"method": "lora", "clients.alpha": 1},
        shared | {"method": "fft", "clients.alpha": 0.5},
        shared | {"method": "fft", "clients.alpha": 1},
    ]


def test_further_grids_stand_on_the_base_alone(tmp_path: Path) -> None:
    grid = '[grid]\nmethod = ["lora", "fft"]\nseed = 5\n'
    also = (
        '[[also]]\nmethod = "slora"\nlora.rank = [1, 2]\n'
        '[[also]]\nclients.partitioner = "iid"\n'
    )
    further = [
        {"method": "slora", "lora.rank": 1},
        {"method": "slora", "lora.rank": 2},
        {"clients.partitioner": "iid"},
    ]
    first = [{"method": "lora", "seed": 5}, {"method": "fft", "seed": 5}]
    assert list(study_of(tmp_path, grid + also).runs) == first + further
    assert list(study_of(tmp_path, also).runs) == further
    assert list(study_of(tmp_path, "[base]\nseed = 3").runs) == [{"seed": 3}]


def test_the_same_config_however_written_is_one_run(tmp_path: Path) -> None:
    text = """
        [grid]
        seed = [0, 1, 1]
        clients.alpha = [1, 1.0]
        [[also]]
        clients.alpha = 1.0
        rounds = 12  # the default
    """
    study = study_of(tmp_path, text)
    assert len(study.runs) == 7
    assert len(list(planned(study))) == 2
    aside: Config = {"run.dir": "/a", "run.metrics-port": 9464, "track": "wandb"}
    assert digest_of(aside) == digest_of({"method": "slora"})
    assert digest_of({"seed": 1}) != digest_of({"seed": 2})


def test_the_order_of_a_study_does_not_change_its_runs(tmp_path: Path) -> None:
    one = '[base]\nrounds = 3\nseed = 1\n[grid]\nmethod = ["lora", "fft"]\n'
    other = '[grid]\nmethod = ["fft", "lora"]\n[base]\nseed = 1\nrounds = 3\n'
    tuning = "[tune]\nlr = [{}]\n"
    digests = [
        {digest_of(config) for config in planned(study_of(tmp_path, text))}
        for text in (one + tuning.format("1, 2"), other + tuning.format("2.0, 1"))
    ]
    assert digests[0] == digests[1]
    assert len(digests[0]) == 2 + 2 * 2


BAD = [
    (
        "[grids]\nseed = 1",
        "grids is no section; allowed: sweep, base, grid, also, tune",
    ),
    ("[sweep]\nengin = 1", "engin is no key of [sweep]; allowed: engine, processes"),
    ("[sweep]\nengine = 'ray'", "sweep.engine is 'ray'; allowed: inline, flwr"),
    ("[sweep]\nprocesses = -1", "sweep.processes is -1; allowed: a whole number"),
    ("[sweep]\nengine = 'flwr'\nprocesses = 2", "allowed: 0 or 1 for engine flwr"),
    ("also = 3", "also is 3; allowed: [[also]]"),
    ("base = 3", "base is 3; allowed: [base]"),
    ("[also]\nseed = 1", "allowed: [[also]]"),
    ("[grid]\nseed = []", "seed is []; allowed: a value, or a list of at least"),
    ("[grid]\nsed = 1", "sed is not a run config key; did you mean seed?"),
    ("[base]\nrun.dir = '/x'", "run.dir is '/x'; allowed: none"),
    ("[grid]\nseed = ['0']", "seed is '0'; allowed: a whole number (in the run seed="),
    (
        "[base]\nrounds = 4\nsparse.rounds = 4\n"
        "[grid]\nmethod = ['fft', 'slora']\nseed = 3",
        "for slora, since rounds is 4 (in the run method='slora', seed=3)",
    ),
    ("[tune]\nrate = 1", "rate is no key of [tune]; allowed: lr, validation, rounds"),
    ("[tune]\nlr = 0.1", "tune.lr is 0.1; allowed: a list of numbers above 0"),
    ("[tune]\nlr = [0]", "tune.lr is [0]; allowed: a list of numbers above 0"),
    ("[tune]\nlr = [1]\nvalidation = 0", "tune.validation is 0; allowed: a number"),
    ("[tune]\nlr = [1]\nper = ['alpha']", "tune.per is ['alpha']; allowed"),
    (
        "[base]\nsparse.rounds = 4\n[tune]\nlr = [1]\nrounds = 3",
        "for slora, since rounds is 3 (in the tuning run method='slora', lora.lr=1.0)",
    ),
    ("[tune]\nlr = [1]\nconfig.lr = 3", "lr is not a run config key"),
    ("[grid", "Expected ']'"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_bad_study_is_refused_by_name(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        study_of(tmp_path, text)
    assert str(refused.value).startswith(f"{tmp_path / 'study.toml'}: ")
    assert message in str(refused.value)


# The config of one run lies among the studies.
STUDIES = {*EXPERIMENTS.glob("*.toml")} - {EXPERIMENTS / "causal.toml"}


@pytest.mark.parametrize("path", sorted(STUDIES), ids=str)
def test_the_studies_of_this_project_can_be_run(path: Path) -> None:
    assert len(list(planned(read_study(path)))) > 1


# Learning rates

TUNED = """
    [base]
    rounds = 30
    sparse.rounds = 10
    seed = 4
    [grid]
    method = ["slora", "sft", "lora", "fft", "pfeiffer"]
    clients.alpha = [0.1, 0.5]
    seed = [0, 1]
    [tune]
    lr = [0.1, 0.01]
    validation = 0.2
    rounds = 6
    config.sparse.rounds = 3
"""
KEYS = {
    "sft": "sparse.lr",
    "lora": "lora.lr",
    "fft": "train.lr",
    "pfeiffer": "bottleneck.lr",
}


class Chooser:
    """Keeps what was to be tuned; the lower and the higher rate by turns."""

    def __init__(self) -> None:
        self.rounds: list[list[Trial]] = []

    def __call__(self, trials: list[Trial]) -> dict[Trial, float]:
        self.rounds.append(trials)
        return {trial: trial.rates[i % 2] for i, trial in enumerate(trials)}


def test_each_method_is_tuned_by_its_own_key_on_held_out_data(tmp_path: Path) -> None:
    choose = Chooser()
    final = tune(study_of(tmp_path, TUNED), choose)
    trials = choose.rounds[0]
    assert [(trial.values, trial.key) for trial in trials] == [
        (("slora",), "sparse.lr"),
        *(((method,), key) for method, key in KEYS.items()),
    ]
    shared: Config = {
        "rounds": 6,
        "sparse.rounds": 3,
        "seed": 4,
        "data.validation": 0.2,
    }
    for trial, (method, key) in zip(trials[1:], KEYS.items(), strict=True):
        for rate in (0.01, 0.1):
            assert trial.config(rate) == shared | {"method": method, key: rate}
    assert len(final) == 5 * 2 * 2
    assert all("data.validation" not in config for config in final)
    assert all(config["rounds"] == 30 for config in final)
    # By `Chooser`: slora, sft, lora, fft and pfeiffer are trials 0 to 4.
    chosen = {"sft": 0.1, "lora": 0.01, "fft": 0.1, "pfeiffer": 0.01}
    for config in final:
        if config["method"] != "slora":
            rates = {key: config[key] for key in config if key.endswith(".lr")}
            method = str(config["method"])
            assert rates == {KEYS[method]: chosen[method]}


def test_two_phases_are_tuned_one_after_the_other(tmp_path: Path) -> None:
    choose = Chooser()
    final = tune(study_of(tmp_path, TUNED), choose)
    first, sft = choose.rounds[0][:2]
    # The very runs that tune `sft`.
    assert first.config(0.1) == sft.config(0.1)
    assert first.config(0.1)["method"] == "sft"
    [second] = choose.rounds[1]
    expected = dict(sft.shared) | {"method": "slora", "sparse.lr": 0.01}
    assert second.config(0.1) == expected | {"lora.lr": 0.1}
    for config in final:
        if config["method"] == "slora":
            assert (config["sparse.lr"], config["lora.lr"]) == (0.01, 0.01)


def test_a_first_phase_of_the_head_is_tuned_by_the_head_alone(tmp_path: Path) -> None:
    choose = Chooser()
    text = '[base]\nmethod = "head-lora"\n[tune]\nlr = [0.1, 0.2]'
    [final] = tune(study_of(tmp_path, text), choose)
    [[first], [second]] = choose.rounds
    share: Config = {"data.validation": 0.1}
    assert first.config(0.2) == share | {"method": "head", "train.lr": 0.2}
    rates: Config = {"train.lr": 0.1, "lora.lr": 0.2}
    assert second.config(0.2) == share | rates | {"method": "head-lora"}
    assert final == {"method": "head-lora", "train.lr": 0.1, "lora.lr": 0.1}


def test_a_rate_is_tuned_for_each_of_the_heads(tmp_path: Path) -> None:
    text = """
        [grid]
        method = ["lora", "head"]
        train.head-lr = [0.3, 0.4]
        [tune]
        lr = [0.1, 0.2]
    """
    choose = Chooser()
    final = tune(study_of(tmp_path, text), choose)
    [trials] = choose.rounds
    # There is nothing to tune where only the head is trained.
    assert [(trial.per, trial.values) for trial in trials] == [
        (("method", "train.head-lr"), ("lora", rate)) for rate in (0.3, 0.4)
    ]
    assert trials[1].config(0.2)["train.head-lr"] == 0.4
    given = [(c["method"], c["train.head-lr"], c.get("lora.lr")) for c in final]
    assert given == [
        ("lora", 0.3, 0.1),
        ("lora", 0.4, 0.2),
        ("head", 0.3, None),
        ("head", 0.4, None),
    ]


def test_rates_that_are_given_are_not_tuned(tmp_path: Path) -> None:
    text = """
        [base]
        sparse.lr = 0.3
        [grid]
        method = ["slora", "sft"]
        [[also]]
        method = ["lora", "fft"]
        lora.lr = [0.5, 0.6]
        [tune]
        lr = [0.1]
    """
    choose = Chooser()
    final = tune(study_of(tmp_path, text), choose)
    every = [trial for trials in choose.rounds for trial in trials]
    assert [(trial.values, trial.key) for trial in every] == [
        (("fft",), "train.lr"),
        (("slora",), "lora.lr"),
    ]
    assert every[1].config(0.1)["sparse.lr"] == 0.3
    given = [(c["method"], c.get("lora.lr"), c.get("train.lr")) for c in final]
    assert given == [
        ("slora", 0.1, None),
        ("sft", None, None),
        ("lora", 0.5, None),
        ("lora", 0.6, None),
        ("fft", 0.5, 0.1),
        ("fft", 0.6, 0.1),
    ]


def test_rates_can_be_tuned_apart_for_more_keys_than_the_method(tmp_path: Path) -> None:
    values = tomllib.loads(TUNED)
    values["tune"]["per"] = ["method", "clients.alpha"]
    choose = Chooser()
    final = tune(study_of(tmp_path, tomli_w.dumps(values)), choose)
    fft = [trial for trial in choose.rounds[0] if trial.values[0] == "fft"]
    assert [trial.values for trial in fft] == [("fft", 0.1), ("fft", 0.5)]
    assert [trial.config(0.1)["clients.alpha"] for trial in fft] == [0.1, 0.5]
    # The seventh and eighth trial of `Chooser`.
    rates = {(c["clients.alpha"], c["train.lr"]) for c in final if c["method"] == "fft"}
    assert rates == {(0.1, 0.01), (0.5, 0.1)}


def test_without_a_rate_a_run_is_left_out(tmp_path: Path) -> None:
    def choose(trials: list[Trial]) -> dict[Trial, float]:
        return {trial: 0.1 for trial in trials if trial.values != ("slora",)}

    final = tune(study_of(tmp_path, TUNED), choose)
    assert {config["method"] for config in final} == set(KEYS)


def scored(accuracy: float, loss: float) -> Score:
    return Score.of([{"accuracy": accuracy, "loss": loss}], Classification())


def test_the_best_rate_has_the_highest_accuracy_then_the_lowest_loss() -> None:
    scores = {
        0.1: scored(0.5, 1.0),
        0.2: scored(0.7, 1.2),
        0.3: scored(0.7, 1.1),
        0.4: scored(0.9, math.nan),
        0.5: scored(0.9, math.inf),
    }
    assert best_rate(scores) == 0.3
    assert best_rate(dict(reversed(scores.items()))) == 0.3
    assert best_rate({0.1: scored(0.2, math.nan), 0.2: scored(0.3, math.nan)}) == 0.2
    assert best_rate({0.2: scored(0.2, 1.0), 0.1: scored(0.2, 1.0)}) == 0.1


def test_a_language_models_best_rate_has_the_lowest_loss() -> None:
    """However many tokens it has right; what diverged is the worst."""
    task = CausalLM()
    scores = {
        0.1: Score.of([{"accuracy": 0.9, "loss": 2.0}], task),
        0.2: Score.of([{"accuracy": 0.1, "loss": 1.0}], task),
        0.3: Score.of([{"accuracy": 0.9}], task),
    }
    assert best_rate(scores) == 0.2
    assert scores[0.1].figures == {"loss": 2.0}


def test_a_score_is_the_mean_of_the_last_three_evaluations() -> None:
    accuracies = [0.9, 0.1, 0.2, 0.6]
    rounds = [{"accuracy": a, "loss": 1 - a} for a in accuracies]
    found = Score.of(rounds, Classification())
    assert found.figures == {
        "accuracy": pytest.approx(0.3),
        "loss": pytest.approx(0.7),
    }
    assert found.merit == found.figures["accuracy"]
    assert Score.of(rounds[:2], Classification()).merit == pytest.approx(0.5)


# Whole sweeps


@pytest.fixture(scope="module")
def base(tiny_models: dict[str, Path], corpus: Path) -> Config:
    return {
        "rounds": 2,
        "model.name": str(tiny_models["bert"]),
        "data.name": str(corpus),
        "data.max-length": 12,
        "clients.count": 4,
        "clients.per-round": 4,
        "clients.partitioner": "iid",
        "train.batch-size": 4,
        "sparse.rounds": 1,
    }


def write_study(path: Path, study: dict[str, Any]) -> Path:
    path.write_text(tomli_w.dumps(study))
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def invoke(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["sweep", *map(str, arguments)])
    return done.exit_code, done.output


@dataclass
class Swept:
    """A sweep that was made: where, its study, and what the command said."""

    folder: Path
    study: dict[str, Any]
    interrupted: Path
    status: int
    output: str

    def path(self, stem: str) -> Path:
        [found] = [p for p in self.folder.glob(f"{stem}-????????") if p.is_dir()]
        return found


@pytest.fixture(scope="module")
def swept(base: Config, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Two seeds of tuned LoRA, a run that fails, and one that was interrupted."""
    place = tmp_path_factory.mktemp("study")
    head: Config = {"method": "head", "train.lr": 0.01}
    study = {
        "sweep": {"processes": 2},
        "base": base,
        "grid": {"method": "lora", "seed": [0, 1]},
        "also": [head, {"method": "lora", "lora.lr": 0.1, "lora.rank": 1000}],
        # The rate that trains is the better one.
        "tune": {"lr": [1e-9, 1e-2], "validation": 0.2},
    }
    folder = place / "results" / "few"
    interrupted = folder / f"some-name-{digest_of(base | head)}"
    (interrupted / "checkpoints").mkdir(parents=True)
    (interrupted / "events.jsonl").write_text("half a li")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 2)  # a thread for each process
        found = invoke(write_study(place / "few.toml", study))
    return Swept(folder, study, interrupted, *found)


def test_a_failing_run_does_not_stop_the_others(swept: Swept) -> None:
    assert swept.status == 1
    failed = (
        f"lora-lr0.1-rank1000-{digest_of(swept.study['base'] | swept.study['also'][1])}"
    )
    assert f"Error: failed: {failed}\n" in swept.output
    assert "lora.rank is 1000; allowed: 1 to 32" in swept.output
    rows = rows_of(swept.folder / "runs.csv")
    assert sorted((row["method"], row["seed"]) for row in rows) == [
        ("head", "0"),
        ("lora", "0"),
        ("lora", "1"),
    ]


def test_an_interrupted_run_is_made_anew(swept: Swept) -> None:
    lines = (swept.interrupted / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2]
    assert (swept.interrupted / "summary.json").is_file()


def test_states_are_not_kept(swept: Swept) -> None:
    kept = {path.name for path in swept.path("lora-lr0.01-seed0").iterdir()}
    tables = {"config.toml", "resolved.toml"}
    assert kept == tables | {"events.jsonl", "ledger.csv", "summary.json"}
    told = "keeps no averaged state; allowed: .* of a sweep with --keep-states"
    with pytest.raises(ConfigError, match=told):
        read_state(swept.path("lora-lr0.01-seed0"), "averaged")


def test_runs_near_the_majority_class_are_named(swept: Swept) -> None:
    rows = rows_of(swept.folder / "runs.csv")
    for row in rows:
        told = json.loads((swept.folder / row["run"] / "summary.json").read_text())
        assert row["warning"] == told.get("warning", "")
    warned = [row["run"] for row in rows if row["warning"]]
    assert 0 < len(warned) < len(rows)
    assert f"in {len(warned)} of {len(rows)} runs: {', '.join(warned)}." in swept.output


def test_each_run_has_a_log_of_its_own(swept: Swept) -> None:
    log = swept.path("lora-lr0.01-seed1").name + ".log"
    written = (swept.folder / log).read_text()
    assert "round 2/2 lora" in written
    assert "\x1b" not in written  # nor colours
    assert "round 2/2 lora" not in swept.output
    assert (swept.folder / log).stat().st_mode & 0o077 == 0


def test_the_rate_that_was_best_on_held_out_data_is_used(swept: Swept) -> None:
    rows = rows_of(swept.folder / "tuning.csv")
    assert [(row["method"], row["key"], float(row["rate"])) for row in rows] == [
        ("lora", "lora.lr", 1e-9),
        ("lora", "lora.lr", 1e-2),
    ]
    low, high = (float(row["accuracy"]) for row in rows)
    assert low < high
    assert [row["chosen"] for row in rows] == ["0", "1"]
    assert "lora: lora.lr 0.01, an end of the grid" in swept.output
    for stem, share in (("tune-lora-lr0.01", 0.2), ("lora-lr0.01-seed0", 0.0)):
        config = tomllib.loads((swept.path(stem) / "config.toml").read_text())
        assert config["data"]["validation"] == share
        assert config["lora"]["lr"] == 0.01


def test_a_run_of_a_sweep_is_as_any_other(swept: Swept, tmp_path: Path) -> None:
    config: Config = swept.study["base"] | {
        "method": "lora",
        "lora.lr": 0.01,
        "seed": 1,
        "run.dir": str(tmp_path / "alone"),
    }
    alone = run(InlineGrid(config), config, run_id=1)
    path = swept.path("lora-lr0.01-seed1")
    found = json.loads((path / "summary.json").read_text())
    for name in ("accuracy", "payload_bytes_up", "payload_bytes_down"):
        assert found[name] == alone[name]
    [row] = [r for r in rows_of(swept.folder / "runs.csv") if r["run"] == path.name]
    assert float(row["accuracy"]) == alone["accuracy"]
    assert float(row["payload_mb_up"]) == alone["payload_bytes_up"] / 1e6
    events = (tmp_path / "alone" / "events.jsonl").read_text().splitlines()
    accuracies = [json.loads(line)["accuracy"] for line in events]
    assert float(row["accuracy_last_5"]) == pytest.approx(sum(accuracies) / 2)


def test_what_is_finished_is_never_run_again(
    swept: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit(*_: object) -> None:
        raise AssertionError("nothing is left to run")

    monkeypatch.setattr(Runner, "_submit", submit)
    # Written otherwise, and by then without the run that fails.
    study = dict(reversed(swept.study.items()))
    study["also"] = study["also"][:1]
    study["grid"] = {"seed": [1, 0], "method": ["lora"]}
    before = rows_of(swept.folder / "runs.csv")
    path = write_study(tmp_path / "other.toml", study)
    status, output = invoke(path, "--out", swept.folder)
    assert status == 0, output
    after = rows_of(swept.folder / "runs.csv")
    assert {row["run"] for row in after} == {row["run"] for row in before}


def test_runs_of_an_edited_study_are_kept_apart(
    swept: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(swept.folder, tmp_path / "few")
    # Another study may have been swept there too, which has all of the runs.
    (folder / ROSTER).unlink()
    study = swept.study | {"grid": {"method": "lora", "seed": [1]}}
    del study["also"]
    status, output = invoke(write_study(tmp_path / "few.toml", study), "--out", folder)
    assert status == 0, output
    done = CliRunner().invoke(app, ["compare", str(folder)])
    assert done.exit_code == 0, done.output
    names = {path.name for path in swept.folder.iterdir() if is_run(path)}
    kept = {swept.path("lora-lr0.01-seed1").name}
    tuning = {name for name in names if name.startswith("tune-")}
    assert len(tuning) == 2
    told = done.stderr.splitlines()[0]
    assert {name for name in names if name in told} == names - kept - tuning
    rows = rows_of(tmp_path / "comparison" / "compare-runs.csv")
    assert {row["run"].split("/")[-1] for row in rows} == kept


def test_a_sweep_of_language_models_goes_by_their_perplexity(tmp_path: Path) -> None:
    made = make_causal(
        save_language_model("llama", tmp_path / "model"),
        write_dialogues(tmp_path / "dialogues.csv"),
    )
    study = {
        "sweep": {"processes": 1},
        "base": made,
        "grid": {"seed": [0, 1]},
        "tune": {"lr": [1e-6, 1e-2], "validation": 0.2, "rounds": 2},
    }
    out = tmp_path / "out"
    status, output = invoke(write_study(tmp_path / "study.toml", study), "--out", out)
    assert status == 0, output
    low, high = rows_of(out / "tuning.csv")
    assert [*low] == ["method", "key", "rate", "loss", "chosen"]
    assert float(low["loss"]) > float(high["loss"])
    assert (low["chosen"], high["chosen"]) == ("0", "1")
    rows = rows_of(out / "runs.csv")
    assert [*rows[0]][1:6] == [
        "perplexity",
        "perplexity_last_5",
        "accuracy",
        "loss",
        "payload_mb_up",
    ]
    for row in rows:
        lines = (out / row["run"] / "events.jsonl").read_text().splitlines()
        by_round = [json.loads(line)["perplexity"] for line in lines]
        assert float(row["perplexity"]) == by_round[-1]
        assert float(row["perplexity_last_5"]) == pytest.approx(sum(by_round) / 2)
        assert f"{row['run']}  perplexity {by_round[-1]:.2f}" in output
    assert "mean of" in output


def make_causal(model: Path, dialogues: Path) -> Config:
    return {
        "task": "causal-lm",
        "method": "lora",
        "rounds": 2,
        "model.name": str(model),
        "data.name": str(dialogues),
        "data.text": "prompt,input",
        "data.response": "response",
        "data.max-length": 24,
        "clients.by": "category",
        "clients.partitioner": "natural",
        "clients.count": 3,
        "clients.per-round": 3,
    }


def test_the_table_is_over_seeds() -> None:
    assert sweeping._mean([0.1, 0.3], ".1%", True) == "20.0% ± 14.1%"
    assert sweeping._mean([0.1, 0.3], ".1%", False) == "20.0%"
    assert sweeping._mean([0.1], ".3f", True) == "0.100"
    assert sweeping._mean([None], ".3f", True) == "-"


def test_the_tables_values_are_no_markup() -> None:
    row = dict.fromkeys(("accuracy", "seconds"), 0.5) | {"data.name": "/x[/e]"}
    console = Console(width=140)
    with console.capture() as printed:
        console.print(sweeping._table([row], ["data.name"]))
    assert "/x[/e]" in printed.get()


def test_a_process_that_dies_fails_its_run_alone(base: Config, tmp_path: Path) -> None:
    study = {
        "sweep": {"processes": 1},
        "base": base | {"method": "head"},
        "grid": {"rounds": [1, 50]},
    }

    def kill_the_first() -> None:
        while not (children := multiprocessing.active_children()):
            time.sleep(0.01)
        children[0].kill()

    killer = threading.Thread(target=kill_the_first)
    killer.start()
    failed = sweep(write_study(tmp_path / "study.toml", study), tmp_path)
    killer.join()
    # The longer run starts first.
    assert failed == [f"rounds50-{digest_of(base | {'method': 'head', 'rounds': 50})}"]
    assert [row["rounds"] for row in rows_of(tmp_path / "runs.csv")] == ["1"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_sweep(
    base: Config, tmp_path: Path, how: signal.Signals
) -> None:
    study = {"sweep": {"processes": 1}, "base": base | {"rounds": 100_000}}
    path = write_study(tmp_path / "study.toml", study)
    # A shell's background jobs ignore it, and so would what they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([*SWEEP, str(path)], stdout=subprocess.DEVNULL)
    signal.signal(signal.SIGINT, before)
    try:
        sweeping = psutil.Process(process.pid)
        # One is multiprocessing's own.
        wait_until(lambda: len(sweeping.children()) >= 2)
        workers = sweeping.children()
        process.send_signal(how)
        assert process.wait(LONG)
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: all(map(has_ended, workers)))


@pytest.mark.parametrize("unit", ["client", "example"])
def test_a_private_run_is_begun_anew(tmp_path: Path, unit: str) -> None:
    """It cannot be resumed, which its config would say."""
    keys: Config = {"privacy.unit": unit, "privacy.epsilon": 8.0}
    keys |= {"privacy.clip-norm": 1.0, "privacy.delta": 0.01}
    assert not StudyRun(keys, tmp_path / "run").can_resume()


def test_two_sweeps_do_not_share_a_folder(base: Config, tmp_path: Path) -> None:
    path = write_study(tmp_path / "study.toml", {"base": base})
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        status, output = invoke(path, "--out", tmp_path)
    finally:
        os.close(descriptor)
    assert status == 2
    assert "where another sweep is under way" in output


SUMMARY = {
    "accuracy": 0.5,
    "macro_f1": 0.4,
    "loss": 1.0,
    "payload_bytes_up": 10,
    "payload_bytes_down": 10,
    "seconds": 3.0,
}


def test_with_engine_flwr_each_run_is_one_of_slora_run(
    base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def call(runner: Runner, *arguments: str, log: BinaryIO) -> int:
        asked.append([*arguments])
        config = tomllib.loads(Path(arguments[-1]).read_text())
        directory = Path(config["run.dir"])
        directory.mkdir()
        if config["seed"] == 0:
            (directory / "summary.json").write_text(json.dumps(SUMMARY))
        return int(config["seed"])

    monkeypatch.setattr(Runner, "_call", call)
    study = {"sweep": {"engine": "flwr"}, "base": base, "grid": {"seed": [0, 1]}}
    (tmp_path / "app" / "experiments").mkdir(parents=True)
    path = write_study(tmp_path / "app" / "experiments" / "study.toml", study)
    (tmp_path / "app" / "pyproject.toml").write_text(
        "[tool.flwr.app.config]\nmethod = 'slora'\n"
    )
    out = tmp_path / "app" / "experiments" / "results" / "study"
    name = f"seed1-{digest_of(base | {'seed': 1})}"
    assert sweep(path) == [name]
    assert ["run", str(tmp_path / "app"), "-c", str(out / f"{name}.toml")] in asked
    assert [row["seed"] for row in rows_of(out / "runs.csv")] == ["0"]
    assert sweep(path) == [name]
    assert len(asked) == 3
