"""slora-flwr from Python: train, look at the result, use it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import typer.testing
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors.torch import load_file
from transformers import pipeline

import slora_flwr
from slora_flwr import ConfigError, Result, RunError, train
from slora_flwr.cli import app
from slora_flwr.config import parse
from slora_flwr.data.data_sets import load_texts
from tests.support.runs import SLORA, Config, events, ledger, make_config, summary
from tests.support.tiny import CLASSES, make_tokenizer

ROOT = Path(__file__).parents[2]
STATES = ("averaged", "best", "last")


@pytest.fixture(scope="module")
def config(
    corpus: Path, tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Config:
    """Two phases whose best round is not the last."""
    home = tmp_path_factory.mktemp("python")
    config = make_config(corpus, tiny_models["bert"], home / "runs" / "20260101-own-7")
    config |= SLORA | {"rounds": 5, "sparse.rounds": 2, "sparse.lr": 0.02}
    config |= {"run.eval-plain": True}
    return config | {"train.batch-size": 8, "lora.lr": 0.05}  # above what is stable


@pytest.fixture(scope="module")
def result(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """From a file, flat keys and tables, each of which overrides those before."""
    file = tmp_path_factory.mktemp("config") / "run.toml"
    file.write_text("rounds = 9\n\n[lora]\nrank = 2\nlr = 0.05\n")
    given = {k: v for k, v in config.items() if not k.startswith("lora.")}
    tables = {"lora": {"rank": config["lora.rank"]}, "data": {"name": Path("nothing")}}
    data = {"data.name": Path(str(config["data.name"]))}
    return train(str(file), tables, given, data, nodes=2)


def test_the_config_is_merged(config: Config, result: Result) -> None:
    assert result.directory == Path(str(config["run.dir"]))
    recorded = result.run.config
    # Left out, so that the config can be run again.
    assert recorded["run.dir"] == ""
    assert config.items() <= (recorded | {"run.dir": config["run.dir"]}).items()
    assert result.run.engine.name == "inline"
    assert result.run.engine.nodes == 2


def test_the_history_is_that_of_the_events(result: Result) -> None:
    recorded = events(result.directory, "round")
    assert [done.round for done in result.history] == [1, 2, 3, 4, 5]
    for done, event in zip(result.history, recorded, strict=True):
        for name in ("round", "phase", "cohort", "train_loss", "payload_bytes"):
            assert getattr(done, name) == event[name]
        for name in ("accuracy", "loss", "macro_f1", "plain_accuracy"):
            assert done.metrics[name] == event[name]
    best = max(recorded, key=lambda event: float(event["accuracy"]))
    assert result.best is not None
    assert result.best.round == best["round"] < 5
    told = summary(result.directory)
    assert told["best"] == {
        "accuracy": result.best.metrics["accuracy"],
        "round": result.best.round,
    }
    assert result.accuracy == told["accuracy"] == recorded[-1]["accuracy"]


def test_it_is_told_in_a_line(result: Result) -> None:
    facts = summary(result.directory)
    best, last = facts["best"], facts["accuracy"]
    assert best["accuracy"] > last
    told = f"{result.directory}: slora, finished, 5 rounds, accuracy {last:.3f}"
    told += f", best {best['accuracy']:.3f} in round {best['round']}"
    assert str(result) == repr(result) == f"<Result of {told}>"


def test_the_ledger_is_that_of_the_run(result: Result) -> None:
    rows = ledger(result.directory)
    assert [
        (str(e.round), e.phase, e.direction, str(e.payload_bytes))
        for e in result.ledger
    ] == [(r["round"], r["phase"], r["direction"], r["payload_bytes"]) for r in rows]


@pytest.mark.parametrize("which", STATES)
def test_a_state_is_the_one_on_disk(result: Result, which: str) -> None:
    path = result.directory / "checkpoints" / f"{which}.safetensors"
    expected, found = load_file(path), result.state(which)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)


def accuracy_of(result: Result, which: str) -> float:
    """Return the accuracy of the model on the run's test texts."""
    _, test = load_texts(parse(result.run.config).data)
    model, tokenizer = result.model(which), make_tokenizer()
    names: Any = model.config.id2label
    assert not model.training
    right = []
    for text, label in zip(test.texts, test.labels, strict=True):
        given = tokenizer(text, truncation=True, max_length=12, return_tensors="pt")
        with torch.inference_mode():
            row = model(given["input_ids"], given["attention_mask"]).logits[0]
        right.append(names[int(row.argmax())] == label)
    return fmean(right)


def test_a_model_is_as_accurate_as_the_run_says(result: Result) -> None:
    told = summary(result.directory)
    last = events(result.directory, "round")[-1]
    accuracies = {
        "averaged": told["accuracy"],
        "best": told["best"]["accuracy"],
        "last": last["plain_accuracy"],
    }
    assert len({*accuracies.values()}) > 1
    for which, expected in accuracies.items():
        assert accuracy_of(result, which) == pytest.approx(expected), which


@pytest.mark.parametrize("which", STATES)
def test_predictions_are_those_of_the_model_and_the_command(
    result: Result, which: str
) -> None:
    texts = ["w5 w6 w7", "w46 w47", "w30 w31 w32 w33"]
    found = result.predict(iter(texts), which)
    assert [one.text for one in found] == texts
    model, tokenizer = result.model(which), make_tokenizer()
    for one in found:
        given = tokenizer(one.text, return_tensors="pt")
        with torch.inference_mode():
            row = model(given["input_ids"], given["attention_mask"]).logits[0]
        assert [*one.probabilities] == CLASSES
        assert row.softmax(-1).tolist() == pytest.approx(
            [*one.probabilities.values()], abs=1e-5
        )
        assert one.label == CLASSES[int(row.argmax())]
    arguments = ["predict", str(result.directory), "--which", which, "--json", *texts]
    done = typer.testing.CliRunner().invoke(app, arguments)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["probabilities"] for line in lines] == [
        one.probabilities for one in found
    ]
    [alone] = result.predict(texts[1], which)
    assert alone.label == found[1].label


def test_model_and_tokenizer_make_a_pipeline(result: Result) -> None:
    classify = pipeline(
        "text-classification",
        model=result.model(),
        tokenizer=result.tokenizer(),
        truncation=True,
    )
    # The last one is longer than data.max-length, and ends unlike its beginning.
    texts = ["w46 w47", "w46 w47 " * 6 + "w5 w6 " * 9]
    for expected, found in zip(result.predict(texts), classify(texts), strict=True):
        assert found["label"] == expected.label
        score = expected.probabilities[expected.label]
        assert found["score"] == pytest.approx(score, abs=1e-5)


def test_an_export_goes_where_it_is_asked_to(result: Result, tmp_path: Path) -> None:
    to = tmp_path / "adapter"
    assert result.export(to, "best") == to
    assert (to / "adapter_config.json").is_file()
    with pytest.raises(ConfigError, match="allowed: a new or empty folder"):
        result.export(to, "best")
    merged = result.export(str(tmp_path / "model"), merge=True)
    assert (merged / "model.safetensors").is_file()


def test_a_plot_shows_the_accuracies(result: Result) -> None:
    axes = Figure().subplots()
    assert result.plot(axes) is axes
    rounds, last = events(result.directory, "round"), "the last state, not averaged"
    lines: dict[str, Any] = {str(li.get_label()): li for li in axes.get_lines()}
    for label, name in {
        "server's test data": "accuracy",
        last: "plain_accuracy",
    }.items():
        assert [*lines[label].get_xdata()] == [event["round"] for event in rounds]
        assert [*lines[label].get_ydata()] == [100 * event[name] for event in rounds]
    legend = axes.get_legend()
    assert legend is not None
    assert last in [text.get_text() for text in legend.get_texts()]


def test_a_plot_makes_axes_of_its_own(
    result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    axes = result.plot()
    assert isinstance(axes, Axes)
    assert axes is pyplot.gca()
    pyplot.close("all")


def test_a_run_is_found_again(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLORA_HOME", str(result.directory.parents[1]))
    for given in (result.directory, str(result.directory), "7", "20260101", None):
        assert Result.of(given) == result
    with pytest.raises(RunError, match="absent is not a run"):
        Result.of("absent")


def test_bottlenecks_predict_though_they_cannot_be_merged(
    config: Config, tmp_path: Path
) -> None:
    changes = {"method": "houlsby", "rounds": 1, "run.dir": tmp_path / "run"}
    result = train(config, changes)
    assert ": houlsby, finished, 1 round, accuracy " in repr(result)
    with pytest.raises(ConfigError, match="allowed: the export that is not merged"):
        result.model()
    [found] = result.predict("w5 w6")
    assert found.label in CLASSES


def test_a_log_that_no_terminal_shows_has_no_colours(
    config: Config, tmp_path: Path
) -> None:
    given = {"method": "lora", "rounds": 1, "run.dir": str(tmp_path / "run")}
    code = f"from slora_flwr import train; train({config!r}, {given!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert "round 1/1 lora" in done.stderr + done.stdout
    assert "\x1b" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("given", "nodes", "told"),
    [
        ({"lora": {"rnk": 4}}, 1, "lora.rnk is not a run config key; did you mean"),
        ({"rounds": 0}, 1, "rounds is 0; allowed: a number from 1"),
        ({}, 0, "nodes is 0; allowed: a number from 1 up"),
        ("absent.toml", 1, "absent.toml cannot be read"),
    ],
)
def test_what_cannot_be_run_is_refused(
    config: Config, tmp_path: Path, given: Config | str, nodes: int, told: str
) -> None:
    place = tmp_path / "run"
    with pytest.raises(ConfigError, match=told):
        train(config, {"run.dir": place}, given, nodes=nodes)
    assert not place.exists()


def test_a_state_that_is_not_there_is_refused(result: Result) -> None:
    for ask in (result.state, result.model, lambda which: result.predict("w5", which)):
        with pytest.raises(ConfigError, match="which is 'first'; allowed: last, "):
            ask("first")


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells, one after another, in a process that draws on no screen."""
    notebook = json.loads((ROOT / "examples" / "python.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"]]
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    code = [cell for cell, kind in zip(cells, kinds, strict=True) if kind == "code"]
    # Fewer texts and rounds than in print.
    smaller = '{"rounds": 2, "sparse.rounds": 1, "data.max-test": 50}, nodes='
    assert code[0].count("nodes=") == 1
    code[0] = code[0].replace("nodes=", smaller)
    monkeypatch.setenv("MPLBACKEND", "agg")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SLORA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my-model" / "model.safetensors").is_file()


# What is public


def test_what_is_public_is_documented_and_nothing_else() -> None:
    page = (ROOT / "docs" / "reference" / "python.md").read_text()
    documented = re.findall(r"^\.\. (?:auto|py:)\w+:: (\S+)$", page, re.M)
    public = {f"slora_flwr.{n}" for n in slora_flwr.__all__ if n != "__version__"}
    assert sorted(documented) == sorted(public | {"slora_embedded.folder"})
    assert dir(slora_flwr) == sorted(slora_flwr.__all__)
    for name in slora_flwr.__all__:
        assert getattr(slora_flwr, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        _ = slora_flwr.absent


def test_looking_at_a_result_needs_no_torch(result: Result) -> None:
    code = (
        "import sys, slora_flwr\n"
        "assert not {m for m in sys.modules if m.startswith('slora_flwr.')}\n"
        "from slora_flwr import ConfigError, Result, RunError, train\n"
        f"assert Result.of({str(result.directory)!r}).best.round\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
