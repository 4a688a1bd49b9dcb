"""Exports in stock PEFT and transformers, without slora_flwr: right, or refused."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save, save_file
from torch.nn import functional as F  # noqa: N812
from typer.testing import CliRunner

from slora_flwr.cli import app
from slora_flwr.config import ConfigError, parse
from slora_flwr.config.methods import METHODS
from slora_flwr.runs.reader import read_run
from slora_flwr.server.export import BASES, export_run
from slora_flwr.training.trainer import Trainer
from tests.support import stock
from tests.support.grids import RecordingGrid
from tests.support.runs import Config, events, facts, make_config, start, summary
from tests.support.tiny import CLASSES, logits

ROOT = Path(__file__).parents[2]
RUNS: dict[str, Config] = {
    **{method: {"method": method} for method in METHODS},
    "slora-w0": {"method": "slora", "lora.base": "w0"},
    "slora-warm": {"method": "slora", "lora.base": "warm-start"},
    "slora-exact": {"method": "slora", "lora.aggregator": "exact"},
    "per-round": {"method": "sft", "sparse.schedule": "per-round"},
    "federa": {"method": "lora", "lora.start": "federa"},
    "root-rank": {"method": "lora", "lora.scaling": "root-rank"},
}
# Exports that stock libraries cannot load as they are: they must refuse.
PATCHED = {"slora", "slora-warm", "slora-exact", "fedex-lora"}
WITH_LAYERS = {"houlsby", "pfeiffer"}
ADAPTERS = {n for n, c in RUNS.items() if "lora" in str(c["method"])} - PATCHED
Found = dict[str, dict[str, float | str]]


@pytest.fixture(scope="module")
def directories(
    corpus: Path,
    tiny_models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """The directories of finished runs."""
    made = {}
    for name, changes in RUNS.items():
        place = tmp_path_factory.mktemp(name) / "run"
        config = make_config(corpus, tiny_models["bert"], place)
        config |= {"train.lr": 0.02, "run.eval-plain": True, **changes}
        made[name] = start(config, RecordingGrid(config))
    return made


def config_of(name: str, directory: Path, corpus: Path, model: Path) -> Config:
    return make_config(corpus, model, directory) | RUNS[name]


def place(folder: Path, examples: Path, model: Path, to: Path) -> dict[str, Any]:
    """Copy an export to where its checkpoint is too."""
    shutil.copytree(folder, to)
    (to / model.name).symlink_to(model)
    return {
        "folder": str(to),
        "checkpoint": f"./{model.name}",
        "examples": str(examples),
        "labels": len(CLASSES),
    }


def load(places: dict[str, dict[str, Any]]) -> Found:
    """Load exports in a process that cannot import slora_flwr."""
    done = subprocess.run(
        [sys.executable, "-P", str(Path(stock.__file__))],
        input=json.dumps(places),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    line = next(x for x in done.stdout.splitlines() if x.startswith("FOUND "))
    return dict(json.loads(line.removeprefix("FOUND ")))


@pytest.fixture(scope="module")
def examples(
    corpus: Path,
    tiny_models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The runs' test data."""
    folder = tmp_path_factory.mktemp("examples")
    config = make_config(corpus, tiny_models["bert"], folder)
    test = Trainer(parse(config)).data.tokenised.test
    ids, mask, labels = test.batch(np.arange(len(test)))
    path = folder / "examples.safetensors"
    save_file({"ids": ids, "mask": mask.to(torch.int64), "labels": labels}, path)
    return path


@pytest.fixture(scope="module")
def found(
    directories: dict[str, Path],
    examples: Path,
    tiny_models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Found:
    """What each way of loading found, by run."""
    root, bert = tmp_path_factory.mktemp("places"), tiny_models["bert"]
    places = {}
    for name, directory in directories.items():
        [folder] = {p.parent for p in directory.glob("*/classes.json")}
        places[name] = place(folder, examples, bert, root / name)
        if name not in WITH_LAYERS:
            merged = export_run(directory, "averaged", True, root / f"{name}-made")
            places[f"{name} merged"] = place(merged, examples, bert, root / f"{name}-m")
    return load(places)


@pytest.mark.parametrize("name", RUNS)
def test_it_has_the_runs_loss_or_is_refused(
    name: str, found: Found, directories: dict[str, Path]
) -> None:
    expected = pytest.approx(summary(directories[name])["loss"], abs=1e-5)
    losses = {way: x for way, x in found[name].items() if isinstance(x, float)}
    assert losses.pop("README") == expected, found[name]
    assert all(loss == expected for loss in losses.values()), losses
    if name in PATCHED | WITH_LAYERS:
        assert not losses
    elif name in ADAPTERS:
        assert {"PeftModel", "load_adapter", "AutoPeft, labels"} <= losses.keys()
    else:
        assert {"Auto", "Bert", "pipeline"} <= losses.keys()
    if name in PATCHED:
        for way in ("PeftModel", "load_adapter", "AutoPeftModel", "AutoPeft"):
            assert "README.md tells how to load" in str(found[name][way])


@pytest.mark.parametrize("name", sorted(RUNS.keys() - WITH_LAYERS))
def test_a_merged_export_is_a_model_of_transformers(
    name: str, found: Found, directories: dict[str, Path]
) -> None:
    expected = pytest.approx(summary(directories[name])["loss"], abs=1e-5)
    losses = found[f"{name} merged"]
    for way in ("README", "Auto", "Bert", "pipeline"):
        assert losses[way] == expected, (way, losses)


def test_every_state_of_a_run_can_be_exported(
    directories: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    """And the averaged one, made anew, is what the run itself has written."""
    for name in ("slora", "slora-exact", "per-round", "alternate-lora"):
        directory = directories[name]
        config = parse(read_run(directory).config)
        trainer = Trainer(config)
        test = trainer.data.tokenised.test
        for which in BASES:
            merged = export_run(directory, which, True, tmp_path / f"{name}-{which}")
            model = stock.Auto.from_pretrained(merged)
            loss = F.cross_entropy(logits(model, test), torch.from_numpy(test.labels))
            number = int(facts(directory, which)["round"])
            [event] = [e for e in events(directory, "round") if e["round"] == number]
            key = "plain_loss" if which == "last" else "loss"
            assert float(loss) == pytest.approx(event[key], abs=1e-5), (name, which)
            card = (merged / "README.md").read_text()
            assert f"the {which} state after {number}" in card
            assert f"loss {event[key]:.3f}" in card
        [own] = {p.parent for p in directory.glob("*/classes.json")}
        anew = export_run(directory, "averaged", False, tmp_path / f"{name}-anew")
        assert {p.name: p.read_bytes() for p in own.iterdir()} == {
            p.name: p.read_bytes() for p in anew.iterdir()
        }


def test_merging_rounds_nothing_of_a_bfloat16_run_away(
    config: Config, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    config |= {"method": "lora", "model.dtype": "bfloat16", "train.lr": 0.02}
    directory = start(config, RecordingGrid(config))
    merged = load_file(
        export_run(directory, "averaged", True, tmp_path / "to") / "model.safetensors"
    )
    state = load_file(directory / "checkpoints" / "averaged.safetensors")
    body = load_file(tiny_models["bert"] / "model.safetensors")
    checkpoint = {f"bert.{name}": tensor for name, tensor in body.items()}
    adapter = LoraConfig.from_pretrained(str(directory / "adapter"))
    scaling = adapter.lora_alpha / adapter.r
    names = {name.removesuffix(".lora_A") for name in state if "lora_A" in name}
    assert names
    for name in names:
        # A base that nobody trains is in bfloat16, and only that is rounded.
        weight = checkpoint[f"{name}.weight"].to(torch.bfloat16).double()
        change = state[f"{name}.lora_B"].double() @ state[f"{name}.lora_A"].double()
        expected = (weight + scaling * change).float()
        assert merged[f"{name}.weight"].dtype == torch.float32
        torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(WITH_LAYERS))
def test_what_cannot_be_merged_is_said(
    name: str, directories: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="bottlenecks are layers of their own"):
        export_run(directories[name], "averaged", True, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_what_cannot_be_exported_is_said(
    directories: dict[str, Path], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(directories["slora"], run)
    to = tmp_path / "to"
    with pytest.raises(ConfigError, match="which is 'first'; allowed: last, averaged"):
        export_run(run, "first", False, to)
    with pytest.raises(ConfigError, match="allowed: a new or empty folder"):
        export_run(run, "last", False, run)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="allowed: a folder that can be made"):
        export_run(run, "last", False, tmp_path / "file" / "to")
    (run / "checkpoints" / "best-base.safetensors").unlink()
    with pytest.raises(ConfigError, match="does not keep the base of its best state"):
        export_run(run, "best", False, to)
    (run / "checkpoints" / "best.safetensors").unlink()
    with pytest.raises(ConfigError, match="keeps no best state"):
        export_run(run, "best", False, to)
    config = (run / "config.toml").read_text()
    other = config.replace(str(tiny_models["bert"]), str(tiny_models["roberta"]))
    (run / "config.toml").write_text(other)
    with pytest.raises(ConfigError, match=r"allowed: those of the run, [0-9a-f]{32}"):
        export_run(run, "last", False, to)
    (run / "config.toml").write_text(config)
    (run / "summary.json").unlink()
    with pytest.raises(ConfigError, match="has not ended"):
        export_run(run, "last", False, to)
    assert not to.exists()


def test_a_failing_export_leaves_nothing(
    directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("slora_flwr.server.export.export_tokenizer", fail)
    with pytest.raises(OSError, match="no space left"):
        export_run(directories["lora"], "last", False, tmp_path / "to")
    assert not (tmp_path / "to").exists()


CLASSES_JSON = "adapter/classes.json"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (CLASSES_JSON, b'["a"', "adapter cannot be read: "),
        ("checkpoints/averaged.safetensors", b"\0" * 99, "safetensors cannot be read"),
        ("checkpoints/averaged.safetensors", save({}), "it has no round"),
        ("checkpoints/base.safetensors", save({}), "it has no digest"),
        ("events.jsonl", b"\0\n", "1 of the lines of events.jsonl cannot be read"),
        ("events.jsonl", b"", "its config and events are not those of its states"),
    ],
)
def test_a_damaged_run_is_one_clear_error(
    directories: dict[str, Path],
    tmp_path: Path,
    name: str,
    content: bytes,
    told: str,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(directories["slora"], run)
    (run / name).write_bytes(content)
    done = CliRunner().invoke(app, ["predict", str(run), "w5 w6"])
    assert done.exit_code == 2, done.output
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_card_tells_no_folder_of_files_that_are_elsewhere(
    directories: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(directories["lora"], run)
    text = (run / "config.toml").read_text()
    text = text.replace(str(corpus), f"/once/here/{corpus.name}")
    (run / "config.toml").write_text(text)
    card = (export_run(run, "last", False, tmp_path / "to") / "README.md").read_text()
    assert f"| data | `{corpus.name}` |" in card


def test_a_card_is_whole_whatever_its_checkpoints_folder_is_called(
    config: Config, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "a|b`c"
    folder.symlink_to(tiny_models["bert"])
    config |= {"rounds": 1, "model.name": str(folder)}
    directory = start(config, RecordingGrid(config))
    card = (directory / "adapter" / "README.md").read_text()
    assert "# ./a/b'c, fine-tuned by lora" in card
    assert "| base | `./a/b'c` |" in card
    assert '"pretrained_model_name_or_path": "./a|b`c"' in card


def test_a_folder_named_like_an_embedded_model_is_not_said_to_be_one(
    config: Config, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "embedded"
    folder.symlink_to(tiny_models["bert"])
    config |= {"rounds": 1, "model.name": str(folder)}
    directory = start(config, RecordingGrid(config))
    card = (directory / "adapter" / "README.md").read_text()
    assert "the folder `./embedded`: copy or link it" in card
    assert "slora_embedded" not in card


def test_an_export_names_nothing_of_this_machine(directories: dict[str, Path]) -> None:
    for directory in directories.values():
        [folder] = {p.parent for p in directory.glob("*/classes.json")}
        for path in folder.iterdir():
            content = path.read_bytes()
            for part in (directory.parts[1], directory.parts[2]):
                assert f"/{part}/".encode() not in content, (path, part)


def test_a_card_of_a_private_run_holds_its_guarantee_and_no_counts(
    config: Config,
) -> None:
    config |= {"method": "lora", "rounds": 1, "privacy.noise-multiplier": 1.0}
    config |= {"privacy.clip-norm": 1.0, "privacy.delta": 0.01}
    directory = start(config, RecordingGrid(config))
    card = (directory / "adapter" / "README.md").read_text()
    assert "-differentially private at noise multiplier 1, over all rounds" in card
    assert "MB" not in card


def test_the_guide_does_as_it_says(
    directories: dict[str, Path],
    tiny_models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All Python of `docs/guides/use-the-result.md`, on runs of three methods."""
    monkeypatch.chdir(tmp_path)
    guide = (ROOT / "docs" / "guides" / "use-the-result.md").read_text()
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", guide, re.DOTALL | re.MULTILINE)
    bert = str(tiny_models["bert"])

    def run_block(number: int, name: str, **given: Any) -> dict[str, Any]:
        code = dedent(blocks[number][1]).replace("CHECKPOINT", bert)
        exec(code.replace("RUN", str(directories[name])), given)
        return given

    assert len(blocks) == 4
    run_block(0, "sft")
    assert isinstance(run_block(1, "lora")["model"], PeftModel)
    plain = stock.Auto.from_pretrained(bert, num_labels=len(CLASSES))
    assert isinstance(run_block(2, "slora", model=plain)["model"], PeftModel)
    run_block(3, "slora")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
