"""The commands of `slora`: what they take, print and leave behind."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w
from click.testing import Result
from typer.testing import CliRunner

from slora_flwr import __version__
from slora_flwr.cli import app
from slora_flwr.runs.lock import sole_use
from slora_flwr.studies.study import read_study
from tests.support.grids import Grid
from tests.support.resuming import assert_same, stop
from tests.support.runs import SLORA, Config, elsewhere, events, start, summary


def slora(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "80"})


def name_of(text: str) -> Path:
    """Return a path below the runs of this test's home."""
    return Path(os.environ["SLORA_HOME"]) / "runs" / text


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLORA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def written(config: Config, tmp_path: Path) -> Path:
    """A run config in a file, without a run directory."""
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps({k: v for k, v in config.items() if k != "run.dir"}))
    return path


# Values


def test_c_takes_the_pairs_that_follow_it(written: Path) -> None:
    given = ("-c", written, "lora.rank=2", "method=lora", "-c", "rounds=7", "seed=3")
    done = slora("config", *given)
    assert done.exit_code == 0, done.output
    printed = tomllib.loads(done.stdout)
    assert (printed["lora"]["rank"], printed["method"]) == (2, "lora")
    assert (printed["rounds"], printed["seed"]) == (7, 3)
    assert slora("plan", "-c", written, "lora.rank=0").stderr == (
        "Error: lora.rank is 0; allowed: a number of at least 1\n"
    )


def test_a_value_without_c_is_no_folder(written: Path) -> None:
    done = slora("run", "rounds=1", "--engine", "inline", "-c", written)
    told = "FOLDER is 'rounds=1'; allowed: a folder; run config values follow -c"
    assert (done.exit_code, done.stderr) == (2, f"Error: {told}\n")


def test_another_librarys_name_is_answered_with_ours() -> None:
    for command in ("run", "plan", "config"):
        done = slora(command, "-c", "lora.r=8")
        told = "lora.r is not a run config key; did you mean lora.rank?"
        assert (done.exit_code, done.stderr) == (2, f"Error: {told}\n")


def test_a_sweeps_values_override_its_base_and_grids(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text("[base]\nrounds = 9\n[grid]\nlora.rank = [2, 4]\nseed = [0, 1]\n")
    study = read_study(path, {"rounds": 5, "seed": 3})
    assert [run["rounds"] for run in study.runs] == [5] * 4
    assert {run["seed"] for run in study.runs} == {3}
    assert {run["lora.rank"] for run in study.runs} == {2, 4}
    for given in ("lora.r=3", "run.dir=/x"):
        done = slora("sweep", path, "-c", given, "seed=1")
        assert done.exit_code == 2, done.output


def test_a_runs_own_config_runs_again_as_it_is(
    config: Config, home: Path, tmp_path: Path
) -> None:
    config |= SLORA | {"rounds": 2}
    first = start(config, Grid(config))
    again = tmp_path / "again"
    path = first / "config.toml"
    given = ("run", "--engine", "inline", "--nodes", 2)
    done = slora(*given, "-c", path, f"run.dir={again}")
    assert done.exit_code == 0, done.output
    assert_same(again, first)
    assert path.read_bytes() == (again / "config.toml").read_bytes()
    # Without a change it is a new run, below the home.
    done = slora(*given, "-c", path)
    assert done.exit_code == 0, done.output
    [new] = (home / "runs").iterdir()
    assert_same(new, first)


# Runs


def test_a_run_resumes_with_its_own_config(config: Config, home: Path) -> None:
    config |= SLORA | {"rounds": 4, "sparse.rounds": 2, "clients.per-round": 4}
    whole = start(config, Grid(config, nodes=2))
    config = elsewhere(config)
    stopped = stop(config, 3)
    done = slora("resume", stopped, "--engine", "inline")
    assert done.exit_code == 0, done.output
    assert [event["round"] for event in events(stopped, "resumed")] == [2]
    assert_same(stopped, whole)
    assert summary(stopped)["directory"] == str(stopped)


def test_resume_takes_the_newest_run_and_its_engine(
    config: Config, home: Path, written: Path
) -> None:
    given = ("run", "--engine", "inline", "--nodes", 3)
    assert slora(*given, "-c", written, "rounds=2").exit_code == 0
    [path] = (home / "runs").iterdir()
    facts = tomllib.loads((path / "resolved.toml").read_text())
    assert facts["engine"] == {"name": "inline", "nodes": 3}
    (path / "summary.json").unlink()
    (path / "checkpoints" / "round-0002.safetensors").unlink()
    done = slora("resume", "-c", "run.keep=1")
    assert done.exit_code == 0, done.output
    assert [event["round"] for event in events(path, "round")] == [1, 2]
    assert [p.name for p in (path / "checkpoints").glob("round-*")] == [
        "round-0002.safetensors"
    ]
    # What must not differ is refused.
    done = slora("resume", path.name, "-c", "rounds=3")
    assert done.exit_code == 2
    assert "rounds is 2 there and 3 here" in done.stderr


def test_a_run_is_known_by_its_beginning_or_its_id(config: Config, home: Path) -> None:
    config |= {"rounds": 1}
    one = start(config, Grid(config))
    names = ["20260101-120000-lora-123", "20260102-120000-lora-1245"]
    for name in names:
        shutil.copytree(one, name_of(name))
    for given in ("20260101", names[0], "123", "20260101-120000-lora"):
        done = slora("report", given)
        assert done.stdout == f"{name_of(names[0]) / 'report.html'}\n"
    for given in ("2026010", "12"):
        done = slora("report", given)
        assert done.exit_code == 2
        told = f"Error: {given} is the beginning of "
        assert done.stderr.startswith(told)
        for name in names:
            assert name in done.stderr
        assert done.stderr.endswith("; allowed: one of them\n")
    done = slora("report", "9")
    told = "9 is not a run; allowed: a run directory"
    assert (done.exit_code, told in done.stderr) == (2, True)


def test_runs_are_listed_within_80_columns(config: Config, home: Path) -> None:
    assert slora("runs").stdout.startswith("There are no runs yet.")
    config |= {"rounds": 1}
    done = start(config, Grid(config))
    # Two that began in one second, so that their names begin alike.
    names = [f"20260102-093000-{n}" for n in ("lora-1234", "alternate-lora-5678")]
    names.append("20260103-093000-lora-1234567890123456789")
    for number, name in enumerate(names):
        shutil.copytree(done, name_of(name))
        os.utime(name_of(name) / "config.toml", (number, number))
    cut = name_of(names[1])
    (cut / "summary.json").unlink()
    text = (cut / "config.toml").read_text()
    text = text.replace('method = "lora"', 'method = "alternate-lora"')
    data = str(config["data.name"])
    text = text.replace(data, f"/x/{'a-very-long-name-of-data' * 3}.csv")
    (cut / "config.toml").write_text(text)
    os.utime(cut / "config.toml", (1, 1))
    damaged = name_of("damaged")
    shutil.copytree(cut, damaged)
    (damaged / "config.toml").write_text("method = ")
    with sole_use(name_of(names[2]) / "events.jsonl", ""):
        found = slora("runs")
    assert found.exit_code == 0, found.output
    heading, *lines = found.stdout.splitlines()
    assert max(map(len, [heading, *lines])) <= 80
    assert heading.split() == "run state method data accuracy MB age".split()
    by_run = {line.split()[0]: line.split()[1:] for line in lines}
    shown = [name[:length] for name, length in zip(names, (17, 17, 15), strict=True)]
    assert by_run.keys() == {*shown, "damaged"}
    for name, path in zip(shown, names, strict=True):
        assert slora("report", name).stdout.startswith(str(name_of(path)))
    state, method, data, accuracy, size, *_ = by_run[shown[0]]
    assert (state, method, data) == ("finished", "lora", "texts.csv")
    assert accuracy == f"{summary(done)['accuracy']:.1%}"
    sent = sum(summary(done)[f"payload_bytes_{way}"] for way in ("up", "down"))
    assert size == f"{sent / 1e6:.1f}"
    assert by_run[shown[1]][:2] == ["interrupted", "alternate-lora"]
    assert by_run[shown[2]][0] == "running"
    assert by_run["damaged"][0] == "unreadable"
    # The newest first.
    assert lines[-1].startswith(shown[0])


def test_a_failed_run_is_told_from_an_interrupted_one(
    config: Config, home: Path
) -> None:
    stop(config | {"run.dir": str(name_of("one"))}, 2)
    stop(config | {"run.dir": str(name_of("two"))}, 2)
    path = name_of("two") / "events.jsonl"
    kept = [line for line in path.open() if "stopped" not in line]
    path.write_text("".join(kept))
    states = {line.split()[0]: line.split()[1] for line in _lines("runs")}
    assert states == {"run": "state", "one": "failed", "two": "interrupted"}


def _lines(*arguments: object) -> list[str]:
    return slora(*arguments).stdout.splitlines()


def test_the_version_is_told() -> None:
    assert slora("--version").stdout == f"slora-flwr {__version__}\n"


def test_looking_needs_no_torch(config: Config, home: Path) -> None:
    config |= {"rounds": 1, "run.dir": str(name_of("one"))}
    start(config, Grid(config))
    code = (
        "import sys; from slora_flwr.cli import app\n"
        "for command in ['runs'], ['--help'], ['run', '--help'], ['--version']:\n"
        "    app(command, standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
