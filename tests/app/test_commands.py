"""The commands of `slora`: what they take, print and leave behind."""

import csv
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from statistics import fmean

import pytest
import tomli_w
import torch
from click.testing import Result
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from slora_flwr import __version__
from slora_flwr.cli import app
from slora_flwr.config import parse
from slora_flwr.data.data_sets import load_texts
from slora_flwr.runs.checkpoint_files import list_checkpoints, number_of
from slora_flwr.runs.lock import sole_use
from slora_flwr.runs.reader import read_run
from slora_flwr.studies.study import read_study
from tests.support.grids import Grid
from tests.support.resuming import (
    InterruptionError,
    StoppingGrid,
    assert_same,
    stop,
)
from tests.support.runs import (
    SLORA,
    Config,
    elsewhere,
    events,
    make_config,
    start,
    summary,
)
from tests.support.tiny import CLASSES


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
    told = "FOLDER is 'rounds=1'; allowed: a folder; run config values follow -c: "
    assert (done.exit_code, done.stderr) == (2, f"Error: {told}-c rounds=1\n")
    done = slora("run", written)
    assert done.stderr.endswith(f"; run config values follow -c: -c {written}\n")


@pytest.mark.parametrize(
    ("before", "values"),
    [
        ("plan", "own.toml"),
        ("config", "own.toml"),
        ("plan", "rounds=3"),
        ("plan --labels 3", "own.toml rounds=3"),
        ("run .", "own.toml"),
        ("sweep study.toml", "own.toml"),
        ("resume 20260101", "run.keep=1"),
    ],
)
def test_values_without_c_are_answered_with_it(before: str, values: str) -> None:
    done = slora(*before.split(), *values.split())
    told = f"Error: {values} does not follow -c; allowed: run config values after it, "
    told += f"as in -c {values}\n"
    assert (done.exit_code, done.stderr) == (2, told)


def test_other_words_too_many_are_named() -> None:
    for given in (("plan", "much"), ("report", "one", "own.toml")):
        done = slora(*given)
        assert done.exit_code == 2
        assert f"Got unexpected extra argument ({given[-1]})" in done.stderr


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


def test_paths_are_relative_to_the_current_folder(
    written: Path, config: Config, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = Path(str(config["data.name"]))
    here = written.parent / "here"
    here.mkdir()
    (here / "own.csv").write_bytes(texts.read_bytes())
    (here / "model").symlink_to(str(config["model.name"]))
    monkeypatch.chdir(here)
    inline = ("run", "--engine", "inline", "-c", written, "rounds=1")
    done = slora(*inline, "data.name=own.csv", "model.name=model", "run.dir=out")
    assert done.exit_code == 0, done.output
    path = here / "out" / "config.toml"
    printed = tomllib.loads(path.read_text())
    assert printed["data"]["name"] == str(here / "own.csv")
    assert printed["model"]["name"] == str(here / "model")
    monkeypatch.chdir(written.parent)
    again = slora("run", "--engine", "inline", "-c", path, "run.dir=again")
    assert again.exit_code == 0, again.output
    assert_same(written.parent / "again", here / "out")
    done = slora(*inline, "data.name=none.csv", "run.dir=third")
    assert done.exit_code == 2
    told = "a file or folder that is there (for `flwr run` by its absolute path, since "
    assert told in done.stderr
    done = slora(*inline, "data.train=none.csv", "run.dir=third")
    assert f"data file {written.parent / 'none.csv'} does not exist" in done.stderr
    done = slora("predict", path.parent, "--file", "none.csv")
    told = "Error: none.csv cannot be read (No such file or directory)\n"
    assert (done.exit_code, done.stderr) == (2, told)


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
    best = json.loads((path / "summary.json").read_text())["best"]["round"]
    assert {number_of(p) for p in list_checkpoints(path)} == {best, 2}
    done = slora("resume", path.name)
    assert done.exit_code == 2
    assert f"RUN is '{path.name}'; allowed: a run that has not finished" in done.stderr
    # A checkpoint names its run.
    done = slora("resume", "-c", f"run.resume={list_checkpoints(path)[0]}")
    assert done.exit_code == 0, done.output
    # What must not differ is refused.
    done = slora("resume", path.name, "-c", "rounds=3")
    assert done.exit_code == 2
    assert "rounds is 2 there and 3 here" in done.stderr


def test_resume_takes_the_newest_run_that_can_be_resumed(
    config: Config, home: Path
) -> None:
    done = slora("resume")
    told = f"Error: {home / 'runs'} holds no run that can be resumed; allowed: RUN, a "
    assert (done.exit_code, done.stderr.startswith(told)) == (2, True)
    older = stop(config | {"run.dir": str(name_of("older"))}, 3)
    newer = stop(config | {"run.dir": str(name_of("newer"))}, 2)
    stop(config | {"run.dir": str(name_of("without"))}, 1)
    start(config | {"run.dir": str(name_of("done"))}, Grid(config))
    shutil.copytree(newer, name_of("damaged"))
    (name_of("damaged") / "config.toml").write_text("method = ")
    shutil.copytree(newer, name_of("going"))
    for age, name in enumerate(("older", "newer", "without", "done", "damaged")):
        os.utime(name_of(name) / "config.toml", (age, age))
    with sole_use(name_of("going") / "events.jsonl", ""):
        for path in (newer, older):
            done = slora("resume", "--engine", "inline")
            assert done.exit_code == 0, done.output
            assert done.stdout.startswith(f"Resuming {path.name}\n")
            assert read_run(path).state == "finished"
        done = slora("resume", "--engine", "inline")
    assert (done.exit_code, done.stderr.startswith(told)) == (2, True)


def test_a_run_whose_rounds_are_held_again_has_not_ended(
    config: Config, home: Path
) -> None:
    config |= {"rounds": 3, "run.keep": 3}
    path = start(config, Grid(config))
    whole = path.with_name("whole")
    shutil.copytree(path, whole)
    checkpoint = list_checkpoints(path)[0]
    with pytest.raises(InterruptionError):
        start(config | {"run.resume": str(checkpoint)}, StoppingGrid(config, 3))
    assert read_run(path).state == "failed"
    with sole_use(path / "events.jsonl", ""):
        done = slora("resume", path)
    assert done.exit_code == 2
    assert "allowed: a run that no process is making" in done.stderr
    done = slora("resume", path, "--engine", "inline", "--nodes", 2)
    assert done.exit_code == 0, done.output
    assert_same(path, whole)


def test_resuming_a_deployments_run_does_not_simulate_it_unasked(
    config: Config, home: Path
) -> None:
    directory = stop(config | {"rounds": 2}, 2)
    resolved = directory / "resolved.toml"
    facts = tomllib.loads(resolved.read_text())
    facts["engine"] = {"name": "deployment", "nodes": 2}
    resolved.write_text(tomli_w.dumps(facts))
    done = slora("resume", directory)
    assert done.exit_code == 2
    assert "flwr run with run.resume" in done.stderr
    assert slora("resume", directory, "--engine", "inline").exit_code == 0


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
    told = f"There are no runs below {home / 'runs'}. `slora run` makes one there; "
    told += "`slora runs FOLDER` lists those below another folder."
    assert " ".join(slora("runs").stdout.split()) == told
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
    assert heading.split() == [
        "run",
        "state",
        "method",
        "data",
        "accuracy",
        "MB",
        "age",
    ]
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
    assert slora("runs", home / "runs").stdout.splitlines()[-1] == lines[-1]


def test_names_are_no_markup(config: Config, home: Path) -> None:
    config |= {"rounds": 1, "run.dir": str(name_of("a[b]\x1b[31mc"))}
    path = start(config, Grid(config)) / "config.toml"
    data = str(config["data.name"])
    path.write_text(path.read_text().replace(data, "/x/my[e]"))
    [_, line] = _lines("runs")
    assert line.startswith("a[b]\\x1b[31mc finished lora   my[e] ")


def test_it_is_told_what_became_of_a_run_and_whether_it_can_go_on(
    config: Config, home: Path
) -> None:
    stop(config | {"run.dir": str(name_of("one"))}, 2)
    stop(config | {"run.dir": str(name_of("two"))}, 2)
    stop(config | {"run.dir": str(name_of("three"))}, 1)
    path = name_of("two") / "events.jsonl"
    kept = [line for line in path.open() if "stopped" not in line]
    path.write_text("".join(kept))
    heading, *lines = _lines("runs")
    states = {line.split()[0]: line.split("lora")[0].split()[1:] for line in lines}
    assert states.pop("three") == ["no", "checkpoint"]
    assert states == {"one": ["failed"], "two": ["interrupted"]}
    assert heading.startswith("run   state         method")


def _lines(*arguments: object) -> list[str]:
    return slora(*arguments).stdout.splitlines()


# What came of a run


@pytest.fixture(scope="module")
def finished(
    corpus: Path, tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of two phases whose best round is not its last."""
    home = tmp_path_factory.mktemp("finished")
    config = make_config(
        corpus, tiny_models["bert"], home / "runs" / "20260101-slora-7"
    )
    config |= SLORA | {"rounds": 5, "sparse.rounds": 2, "sparse.lr": 0.02}
    config |= {"train.batch-size": 8, "lora.lr": 0.05}  # above what is stable
    directory = start(config, Grid(config))
    assert 2 < summary(directory)["best"]["round"] < 5
    return directory


def correct(run: Path, which: str) -> float:
    """Return the accuracy of predictions on the run's test data."""
    config = read_run(run).config
    _, test = load_texts(parse(config).data)
    path = run.parent / "test.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "text"])
        rows.writerows(enumerate(test.texts))
    done = slora("predict", run, "--file", path, "--which", which, "--json")
    assert done.exit_code == 0, done.output
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["text"] for one in found] == test.texts
    for one in found:
        assert sum(one["probabilities"].values()) == pytest.approx(1)
        assert one["probability"] == max(one["probabilities"].values())
        assert one["probabilities"][one["label"]] == one["probability"]
        assert [*one["probabilities"]] == CLASSES
    labels = [one["label"] for one in found]
    return fmean(map(str.__eq__, labels, test.labels))


def test_predictions_are_as_accurate_as_the_run_says(finished: Path) -> None:
    told = summary(finished)
    assert correct(finished, "averaged") == pytest.approx(told["accuracy"])
    assert correct(finished, "best") == pytest.approx(told["best"]["accuracy"])


def test_a_text_is_given_or_read_from_a_file(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLORA_HOME", str(finished.parents[1]))
    texts = ["w5 w6 w7", "w46 w47"]
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(texts) + "\n")
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    printed = {
        slora("predict", *given).stdout
        for given in (
            (*texts,),
            ("20260101", *texts),
            ("7", *texts),
            ("--file", path),
            ("7", "--file", lines),
        )
    }
    [told] = printed
    cells = [line.split("\t") for line in told.splitlines()]
    assert [text for _, _, text in cells] == texts
    for label, probability, _ in cells:
        assert label in CLASSES
        assert 1 / 3 <= float(probability) <= 1
    assert slora("predict", texts[0]).stdout == told.splitlines()[0] + "\n"
    # A word alone is a text, even where a run begins so.
    assert slora("predict", "2026").stdout.endswith("\t2026\n")


def test_any_text_is_a_text(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLORA_HOME", str(finished.parents[1]))
    texts = ["~nobody has it", "", "w5\u2028w6\x85w7\x0c", "a [/b] \\ *c*", "w" * 9999]
    path = tmp_path / "texts.txt"
    path.write_bytes("\r\n".join(texts).encode())
    for given in (texts, ["--file", str(path)]):
        lines = slora("predict", "--json", *given).stdout.rstrip("\n").split("\n")
        assert [json.loads(line)["text"] for line in lines] == texts
    assert slora("predict", texts[0]).stdout.endswith(f"\t{texts[0]}\n")
    path.write_text("")
    assert (slora("predict", "--file", path).stdout, path.write_text("\n")) == ("", 1)
    assert len(_lines("predict", "--file", path)) == 1


def test_what_cannot_be_predicted_is_refused(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLORA_HOME", str(finished.parents[1]))
    other = tmp_path / "other.csv"
    other.write_text("title\nw5\n")
    empty = tmp_path / "empty.csv"
    empty.write_text("text,title\n")
    for given, told in {
        (): "TEXT is missing; allowed: one or more, or --file",
        (str(finished),): f"TEXT is missing, since {finished} names a run; allowed",
        (finished.name,): f"since {finished.name} names a run; allowed: one or more",
        ("7",): "TEXT is missing, since 7 names a run",
        (finished.name[:-1], ""): "TEXT is ''; allowed: a text that is not empty",
        (" ",): "TEXT is ''",
        ("7", "text", "--file", str(other)): "TEXT is 'text'; allowed: none",
        ("--file", str(other)): "data.text names 'text'; the columns are title",
        ("--file", str(tmp_path / "absent.txt")): "absent.txt cannot be read",
        ("absent", "--file", str(other)): "absent is not a run",
        ("--file", "/dev/stdin"): "data file is /dev/stdin; allowed: .txt, .csv, ",
        ("--file", str(empty)): "it has no rows below a header",
        ("w5 \udcff",): "text is 'w5 \\udcff'; allowed: characters that UTF-8 has",
    }.items():
        done = slora("predict", *given)
        assert done.exit_code == 2, done.output
        assert done.stderr.startswith("Error: ")
        assert told in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_reader_may_stop(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("w5 w6\n" * 9)
    command = [sys.executable, "-c", "from slora_flwr.cli import app; app()"]
    with subprocess.Popen(
        [*command, "predict", str(finished), "--file", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert "Error" not in process.stderr.read()


@pytest.mark.parametrize("which", ["last", "best", "averaged"])
def test_a_merged_export_predicts_what_the_run_does(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    monkeypatch.setenv("SLORA_HOME", str(finished.parents[1]))
    to = tmp_path / "model"
    done = slora("export", "--which", which, "--merge", "--to", to)
    assert (done.exit_code, done.stdout) == (0, f"{to}\n"), done.output
    model = AutoModelForSequenceClassification.from_pretrained(to)
    given = AutoTokenizer.from_pretrained(to)("w5 w6 w7", return_tensors="pt")
    with torch.inference_mode():
        logits = model(given.input_ids, given.attention_mask).logits
    line = slora("predict", "--which", which, "--json", "w5 w6 w7").stdout
    expected = [*json.loads(line)["probabilities"].values()]
    assert logits.softmax(-1)[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_an_export_goes_to_a_folder_named_like_its_run(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert slora("export", finished, "--which", "last").exit_code == 0
    [folder] = tmp_path.iterdir()
    assert folder.name == "20260101-slora-7-last"
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    above = finished / "checkpoints" / ".."
    assert slora("export", above, "--which", "last").exit_code == 0
    assert (tmp_path / "below" / folder.name).is_dir()
    monkeypatch.chdir(tmp_path)
    again = slora("export", finished, "--which", "last")
    assert again.exit_code == 2
    assert "allowed: a new or empty folder" in again.stderr


def test_the_version_is_told() -> None:
    assert slora("--version").stdout == f"slora-flwr {__version__}\n"


def test_looking_needs_no_torch(config: Config, home: Path) -> None:
    config |= {"rounds": 1, "run.dir": str(name_of("one"))}
    start(config, Grid(config))
    code = (
        "import sys; from slora_flwr.cli import app\n"
        "for command in ['runs'], ['--help'], ['predict', '--help'], ['--version']:\n"
        "    app(command, standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
