"""Whole runs of language models, and their exports in stock libraries."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from slora_flwr.config import ConfigError, parse
from slora_flwr.data.examples import IGNORED
from slora_flwr.runs.reader import read_run
from slora_flwr.server.export import export_run
from slora_flwr.server.predict import predict_texts
from slora_flwr.training.trainer import Trainer
from tests.support.causal import (
    CATEGORIES,
    LANGUAGE_MODELS,
    save_language_model,
    write_dialogues,
)
from tests.support.grids import Grid
from tests.support.resuming import assert_same, go_on, stop
from tests.support.runs import Config, elsewhere, events, ledger, start, summary
from tests.support.stock import read_code

METHODS = ("fft", "sft", "slora", "lora", "ffa-lora", "fedex-lora", "flexlora")
# Loads exports as their README says; slora_flwr cannot be imported.
STOCK = """
import json, os, sys
for name in ("slora_flwr", "slora_embedded"):
    sys.modules[name] = None
import torch
from safetensors.torch import load_file
for place in json.load(sys.stdin):
    os.chdir(place["folder"])
    given = {}
    exec(place["code"], given)
    model, tokenizer = given["model"].eval(), given["tokenizer"]
    examples = load_file(place["examples"])
    labels = examples["labels"][:, 1:]
    with torch.no_grad():
        out = model(input_ids=examples["ids"], attention_mask=examples["mask"])
        said = model.generate(
            **tokenizer(place["asked"], add_special_tokens=False,
                        return_token_type_ids=False, return_tensors="pt"),
            max_new_tokens=8, do_sample=False)
    loss = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].float().transpose(1, 2), labels)
    text = tokenizer.decode(said[0], skip_special_tokens=True)
    print("FOUND " + json.dumps([float(loss), text]))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("language-models")
    return {f: save_language_model(f, root / f) for f in LANGUAGE_MODELS}


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dialogues(tmp_path_factory.mktemp("data") / "dialogues.csv")


def make(model: Path, dialogues: Path, directory: Path, **changes: Any) -> Config:
    config: Config = {
        "task": "causal-lm",
        "rounds": 3,
        "model.name": str(model),
        "data.name": str(dialogues),
        "data.text": "prompt,input",
        "data.response": "response",
        "data.max-length": 24,
        "clients.by": "category",
        "clients.partitioner": "natural",
        "clients.count": 3,
        "clients.per-round": 3,
        "train.lr": 0.01,
        "sparse.rounds": 1,
        "sparse.density": 0.05,
        "lora.rank": 4,
        "run.dir": str(directory),
    }
    return config | changes


@pytest.fixture(scope="module")
def runs(
    folders: dict[str, Path],
    dialogues: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Finished runs: of each method on Llama, of three on the others."""
    made = {}
    for family, folder in folders.items():
        for method in METHODS if family == "llama" else ("fft", "slora", "lora"):
            directory = tmp_path_factory.mktemp(f"{family}-{method}") / "run"
            config = make(folder, dialogues, directory, method=method)
            made[f"{family} {method}"] = start(config, Grid(config))
    return made


def test_perplexity_falls_and_clients_are_the_columns_values(
    runs: dict[str, Path], dialogues: Path
) -> None:
    for name, directory in runs.items():
        rounds = events(directory, "round")
        assert rounds[-1]["perplexity"] < rounds[0]["perplexity"], name
        found = summary(directory)
        assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))
        assert found["best"] == {
            "loss": min(r["loss"] for r in rounds),
            "round": 1 + int(np.argmin([r["loss"] for r in rounds])),
        }
        assert "majority_accuracy" not in found
        # Half of all dialogues are of one category, a quarter of each other.
        sizes = [done["examples"] for done in rounds[0]["clients"].values()]
        assert len(sizes) == len(CATEGORIES)
        assert sizes[0] > sum(sizes[1:]) * 0.6


def test_exports_have_the_runs_loss_and_say_the_same_in_stock_libraries(
    runs: dict[str, Path],
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    places, expected = [], []
    for name, directory in runs.items():
        family = name.split()[0]
        trainer = Trainer(parse(read_run(directory).config))
        test = trainer.data.tokenised.test
        ids, mask, labels = test.batch(np.arange(len(test)))
        examples = tmp_path / f"{name}.safetensors"
        save_file({"ids": ids, "mask": mask, "labels": labels}, examples)
        assert (labels == IGNORED).any()
        [answer] = predict_texts(directory, "averaged", ["w9 w8"])
        for merge in (False, True):
            to = tmp_path / f"{name}-{merge}"
            export_run(directory, "averaged", merge, to)
            (to / family).symlink_to(folders[family])
            code = read_code((to / "README.md").read_text())
            places.append(
                {
                    "folder": str(to),
                    "code": code,
                    "examples": str(examples),
                    "asked": "w9 w8\n",
                }
            )
            expected.append((summary(directory)["loss"], answer.facts["response"]))
    done = subprocess.run(
        [sys.executable, "-P", "-c", STOCK],
        input=json.dumps(places),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [x for x in done.stdout.splitlines() if x.startswith("FOUND ")]
    for place, line, (loss, response) in zip(places, lines, expected, strict=True):
        found, text = json.loads(line.removeprefix("FOUND "))
        assert found == pytest.approx(loss, abs=1e-5), place["folder"]
        said = text.removeprefix("w9 w8").strip()
        assert response.startswith(said), place["folder"]


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_answers_before_and_after_are_printed_at_the_end(
    folders: dict[str, Path],
    dialogues: Path,
    tmp_path: Path,
    noise: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With privacy too: the prompts are those of the server's test data."""
    private = {"privacy.clip-norm": 1.0, "privacy.delta": 0.01} if noise else {}
    private |= {"privacy.noise-multiplier": noise}
    config = make(folders["llama"], dialogues, tmp_path / "run", **private)
    trainer = Trainer(parse(config))
    test = trainer.data.tokenised.test
    trainer.model.detach()
    pretrained = trainer.sample_test()
    assert len(test) > 3
    capsys.readouterr()
    start(config, Grid(config))
    said = capsys.readouterr().out.partition("answers to test prompts")[2]
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in said.splitlines()
        if line.startswith("│")
    ]
    told: dict[str, list[str]] = {}
    for name, text in rows:
        last = name or last
        told.setdefault(last, []).extend(text.split())
    for name, texts in (
        ("prompt", [s.prompt for s in pretrained]),
        ("right", [s.right for s in pretrained]),
        ("before", [s.said for s in pretrained]),
    ):
        assert told[name] == " ".join(texts).split()
    assert told["after"] != told["before"]


def test_a_killed_run_goes_on_bit_for_bit(
    folders: dict[str, Path], dialogues: Path, tmp_path: Path
) -> None:
    config = make(folders["gemma"], dialogues, tmp_path / "whole", method="slora")
    whole = start(config, Grid(config, nodes=2))
    config = elsewhere(config)
    stopped = stop(config, 3)
    go_on(config)
    assert_same(stopped, whole)


def test_the_result_does_not_depend_on_the_number_of_nodes(
    folders: dict[str, Path], dialogues: Path, tmp_path: Path
) -> None:
    made = []
    for nodes in (1, 3):
        config = make(
            folders["llama"],
            dialogues,
            tmp_path / f"{nodes}",
            method="slora",
            **{"clients.weight": "tokens", "clients.holdout": 0.25},
        )
        made.append(start(config, Grid(config, nodes=nodes)))
    one, other = map(summary, made)
    for key in ("loss", "perplexity", "accuracy", "payload_bytes_up"):
        assert one[key] == other[key]
    held = [events(d, "round")[-1]["client_perplexity"] for d in made]
    assert held[0] == held[1]


def test_clients_weigh_as_many_tokens_as_they_learn(
    folders: dict[str, Path], dialogues: Path, tmp_path: Path
) -> None:
    changes = {"method": "lora", "rounds": 1, "clients.weight": "tokens"}
    config = make(folders["llama"], dialogues, tmp_path / "run", **changes)
    directory = start(config, Grid(config))
    trainer = Trainer(parse(config))
    [done] = events(directory, "round")
    for client in range(3):
        examples, _ = trainer.data.examples(client)
        assert examples.learned is not None
        expected = int(examples.learned.sum())
        assert done["clients"][str(client)]["examples"] == expected


def test_coded_uploads_and_privacy_hold_for_language_models(
    folders: dict[str, Path], dialogues: Path, tmp_path: Path
) -> None:
    coded = {"upload.dtype": "int8", "upload.lossless": True}
    config = make(folders["llama"], dialogues, tmp_path / "coded", **coded)
    plain = make(folders["llama"], dialogues, tmp_path / "plain")
    sent = [
        sum(int(row["payload_bytes"]) for row in ledger(d) if row["direction"] == "up")
        for d in (start(config, Grid(config)), start(plain, Grid(plain)))
    ]
    assert sent[0] < sent[1] / 3
    private = {"privacy.noise-multiplier": 1.0, "privacy.clip-norm": 1.0}
    private |= {"privacy.delta": 0.01}
    config = make(folders["llama"], dialogues, tmp_path / "private", **private)
    found = summary(start(config, Grid(config)))
    assert found["privacy"]["epsilon"] > 0
    assert found["perplexity"] > 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"method": "head"}, "finds none for causal-lm"),
        ({"method": "bitfit"}, "finds none for causal-lm"),
        ({"clients.count": 4, "clients.per-round": 4}, "the values of the column"),
        ({"data.response": "answer"}, "data.response names 'answer'; the columns are"),
        ({"clients.by": "region"}, "clients.by names 'region'; the columns are"),
        ({"data.messages": "chat"}, "data.messages names 'chat'; the columns are"),
        ({"data.template": "chat"}, "no chat template; allowed: alpaca, plain"),
    ],
)
def test_what_cannot_be_is_refused_before_any_client_is_asked(
    folders: dict[str, Path],
    dialogues: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    told: str,
) -> None:
    config = make(folders["llama"], dialogues, tmp_path / "run", **changes)
    with pytest.raises(ConfigError, match=told):
        start(config, Grid(config))
