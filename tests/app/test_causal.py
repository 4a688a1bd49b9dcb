"""Whole runs of language models, and their exports in stock libraries."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from slora_flwr.cli import app
from slora_flwr.config import ConfigError, DataConfig, parse
from slora_flwr.data.data_sets import read_unlabelled
from slora_flwr.data.dialogues import answered, ask, text_of
from slora_flwr.data.examples import IGNORED
from slora_flwr.data.shared_files import read_file
from slora_flwr.data.texts import Texts
from slora_flwr.result import Result
from slora_flwr.runs.events import RecordedRound
from slora_flwr.runs.reader import read_run
from slora_flwr.server.conversation import Conversation
from slora_flwr.server.export import KeptState, export_run
from slora_flwr.server.phase import ActivePhase
from slora_flwr.server.predict import answer_texts, predict_texts
from slora_flwr.tasks.causal_lm import MOST_TOKENS
from slora_flwr.training.trainer import Trainer
from tests.support.causal import (
    CATEGORIES,
    LANGUAGE_MODELS,
    save_language_model,
    write_dialogues,
)
from tests.support.grids import Grid
from tests.support.resuming import assert_same, go_on, stop
from tests.support.runs import Config, elsewhere, events, start, summary
from tests.support.stock import read_code

OWN = {"clients.count": 0, "clients.holdout": 0.2, "clients.partitioner": "iid"}
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


def test_a_target_is_a_perplexity_to_come_down_to(
    runs: dict[str, Path], folders: dict[str, Path], dialogues: Path, tmp_path: Path
) -> None:
    rounds = events(runs["llama fft"], "round")
    high, *_, low = (done["perplexity"] for done in rounds)
    config = make(folders["llama"], dialogues, tmp_path / "run", method="fft")
    config["run.target"] = (high + low) / 2
    found = summary(start(config, Grid(config)))["target"]
    assert found["round"] == next(
        done["round"] for done in rounds if done["perplexity"] <= config["run.target"]
    )
    assert found["round"] > 1
    with pytest.raises(ConfigError, match=r"run\.target is 0\.5; allowed: a perp"):
        start(config | {"run.target": 0.5}, Grid(config))


def test_an_open_phase_goes_by_the_loss(
    folders: dict[str, Path], dialogues: Path, tmp_path: Path
) -> None:
    """A model whose loss falls goes on, however few tokens it has right."""
    config = make(folders["llama"], dialogues, tmp_path / "run")
    trainer = Trainer(parse(config | {"rounds": 9, "sparse.rounds": 0}))
    phase = ActivePhase.begin(trainer)
    phase.phase_round = 5
    assert phase.phase.is_open

    def ends(losses: list[float], hits: list[float]) -> bool:
        return phase.has_ended(
            [
                RecordedRound(
                    phase="sparse",
                    cohort=[],
                    clients={},
                    round=number,
                    replied=3,
                    payload_bytes=0,
                    metrics={"loss": loss, "accuracy": hit},
                    kept_energy=0.5,
                )
                for number, (loss, hit) in enumerate(
                    zip(losses, hits, strict=True), start=1
                )
            ]
        )

    assert not ends([5.0, 4.0, 3.0, 2.0, 1.0], [0.1] * 5)
    assert ends([2.0] * 5, [0.1, 0.2, 0.3, 0.4, 0.5])


def test_a_language_model_learns_to_name_newsgroups(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exact matches are what a classifier's accuracy is of."""
    groups = ["w11", "w12"]
    folder = tmp_path / "assets" / "data" / "20newsgroups"
    folder.mkdir(parents=True)
    for split, count in (("train", 48), ("test", 12)):
        lines = ["text,label,label_text"]
        lines += [
            f"w{6 + i % 2} w{20 + i % 5},{i % 2},{groups[i % 2]}" for i in range(count)
        ]
        (folder / f"{split}.csv").write_text("\n".join(lines))
    monkeypatch.setenv("SLORA_ASSETS", str(tmp_path / "assets"))
    config: Config = {
        "method": "fft",
        "rounds": 8,
        "model.name": str(folders["llama"]),
        "data.name": "20newsgroups",
        "data.max-length": 24,
        "clients.count": 4,
        "clients.per-round": 4,
        "clients.alpha": 10.0,
        "train.lr": 0.01,
        "run.eval-every": 0,
    }
    names: Config = config | {
        "task": "causal-lm",
        "run.dir": str(tmp_path / "names"),
        "run.generate": 12,
        "run.max-tokens": 2,
    }
    labels: Config = config | {"run.dir": str(tmp_path / "labels")}
    found = summary(start(names, Grid(names)))
    assert found["exact_match"] == 1
    assert summary(start(labels, Grid(labels)))["accuracy"] == 1
    [answer] = predict_texts(tmp_path / "names", "averaged", ["w7 w20"])
    assert answer.line == "w12"


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


def test_the_guides_loading_code_is_right(
    runs: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    guide = Path(__file__).parents[2] / "docs" / "guides" / "language-models.md"
    adapter, merged = re.findall(r"```python\n(.*?)```", guide.read_text(), re.S)
    assert 'PeftModel.from_pretrained(model, "RUN/adapter")' in adapter
    directory = runs["llama lora"]
    export_run(directory, "averaged", True, tmp_path / "merged")
    [expected] = predict_texts(directory, "averaged", ["w9 w8"])
    for code in (adapter, merged):
        code = code.replace("RUN", str(directory)).replace(
            '"merged', f'"{tmp_path}/merged'
        )
        code = code.replace("CHECKPOINT", str(folders["llama"]))
        given: dict[str, Any] = {}
        exec(code, given)
        tokenizer, model = given["tokenizer"], given["model"].eval()
        ids = tokenizer("w9 w8\n", add_special_tokens=False, return_tensors="pt")
        ids = ids["input_ids"]
        said = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        text = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
        assert expected.facts["response"].startswith(text.strip())


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
    last = ""
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


def test_privacy_holds_for_language_models(
    folders: dict[str, Path], dialogues: Path, tmp_path: Path
) -> None:
    private = {"privacy.noise-multiplier": 1.0, "privacy.clip-norm": 1.0}
    private |= {"privacy.delta": 0.01}
    config = make(folders["llama"], dialogues, tmp_path / "private", **private)
    found = summary(start(config, Grid(config)))
    assert found["privacy"]["epsilon"] > 0
    assert found["perplexity"] > 1


def test_a_result_is_that_of_a_language_model(runs: dict[str, Path]) -> None:
    found = Result.of(runs["llama lora"])
    best = min(found.history, key=lambda done: done.metrics["perplexity"])
    assert found.best == best
    assert found.plot().get_ylabel() == "perplexity"
    model: Any = found.model()
    tokenizer = found.tokenizer()
    given = tokenizer("w9 w8\n", add_special_tokens=False, return_tensors="pt")
    ids = given["input_ids"]
    said = model.generate(ids, max_new_tokens=8, do_sample=False)
    [answer] = found.predict("w9 w8")
    text = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer.response.startswith(text)


def slora(*arguments: object, given: str | None = None) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments)], input=given)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_file_of_prompts_keeps_an_instructions_input_apart(
    runs: dict[str, Path], folders: dict[str, Path], dialogues: Path, tmp_path: Path
) -> None:
    """As in training: templates such as alpaca's write it elsewhere."""
    alpaca = {"method": "lora", "rounds": 1, "data.template": "alpaca"}
    config = make(folders["llama"], dialogues, tmp_path / "run", **alpaca)
    # Long enough for the template, whose words the tokenizer does not know.
    config |= {"data.max-length": 40}
    for directory in (start(config, Grid(config)), runs["llama lora"]):
        kept = KeptState.read(directory, "averaged")
        rows = read_file(dialogues, ["prompt", "input"]).columns
        asked = [ask([p, i or ""]) for p, i in zip(*rows.values(), strict=True)]
        texts = Texts(list(map(text_of, asked)), [""] * len(asked), dialogues=asked)
        expected = [answer.facts for answer in answer_texts(kept, texts)]
        told = slora("predict", directory, "--file", dialogues, "--json")
        assert list(map(json.loads, told.splitlines())) == expected
        assert expected[1]["prompt"].count("\n") == 1


def test_a_file_of_conversations_is_answered_at_its_end(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    turns = ask(["w9 w8"])
    other = [*answered(turns, "w5"), *ask(["w7"])]
    rows = [turns, answered(turns, "w6"), other]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"chat": row}) + "\n" for row in rows))
    data = DataConfig(messages="chat")
    found = read_unlabelled(data, path, dialogues=True)
    assert found.dialogues == [turns, turns, other]
    path.write_text(json.dumps({"chat": [{"role": "assistant", "content": "w5"}]}))
    with pytest.raises(ConfigError, match="row 1: it has no message to respond to"):
        read_unlabelled(data, path, dialogues=True)


def test_a_chat_keeps_the_dialogue_until_a_blank_line(runs: dict[str, Path]) -> None:
    directory = runs["llama fft"]
    told = slora("chat", directory, given="w9 w8\n\nw9 w8\nw7\n").splitlines()
    first, again, second = told
    assert first == again
    [answer] = predict_texts(directory, "averaged", ["w9 w8"])
    assert first == answer.facts["response"]
    talk = Conversation(directory, "averaged")
    assert [talk.say("w9 w8"), talk.say("w7")] == [first, second]
    assert talk.dialogue[:3] == [*answered(ask(["w9 w8"]), first), *ask(["w7"])]


def test_max_tokens_bound_responses(runs: dict[str, Path]) -> None:
    prompts = [f"w{number} w8" for number in range(5, 25)]
    directory, prompt, words = next(
        (directory, prompt, answer.line.split())
        for directory in runs.values()
        for prompt, answer in zip(
            prompts, predict_texts(directory, "averaged", prompts), strict=True
        )
        if len(answer.line.split()) > 2
    )
    for command in (("predict", directory, prompt), ("chat", directory)):
        told = slora(*command, "--max-tokens", "2", given=f"{prompt}\n")
        assert told.split() == words[:2]
        help_ = slora(command[0], "--help").replace("│", " ")
        assert f"a response; default: {MOST_TOKENS}." in " ".join(help_.split())


def test_labels_have_no_tokens_to_bound(config: Config) -> None:
    directory = start(config, Grid(config))
    with pytest.raises(ConfigError, match="--max-tokens is 4; allowed: none, since"):
        predict_texts(directory, "averaged", ["w5"], most=4)


def test_a_long_chat_forgets_what_is_oldest(runs: dict[str, Path]) -> None:
    talk = Conversation(runs["llama fft"], "averaged")
    for number in range(12):
        talk.say(f"w{10 + number} w{20 + number}")
        said = [t["content"] for t in talk.dialogue if t["role"] == "user"]
        assert said[-1] == f"w{10 + number} w{20 + number}"
        # Prompts have up to 24 tokens.
        assert sum(len(t["content"].split()) for t in talk.dialogue[:-1]) <= 24
    assert len(said) < 12


def test_ctrl_c_ends_a_chat_without_a_traceback(runs: dict[str, Path]) -> None:
    code = "from slora_flwr.cli import app; app()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "chat", runs["llama fft"]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        chat.stdin.write("w9 w8\n")
        chat.stdin.flush()
        assert chat.stdout.readline().endswith("\n")  # it may say nothing
        chat.send_signal(signal.SIGINT)
        _, errors = chat.communicate()
    assert (chat.returncode, "Traceback" in errors) == (0, False)


def test_only_language_models_chat(config: Config) -> None:
    directory = start(config, Grid(config))
    done = CliRunner().invoke(app, ["chat", str(directory)], input="w5\n")
    assert done.exit_code == 2
    assert "allowed: a run of a language model" in " ".join(done.output.split())


QUESTIONS = [
    {"question": "w10 w11", "choices": ["w11 w12", "w40 w41"], "answer": 0},
    {"question": "w20", "choices": ["w60", "w21"], "answer": 1},
]


def test_what_is_asked_besides_is_in_events_summary_and_card(
    folders: dict[str, Path], dialogues: Path, tmp_path: Path
) -> None:
    """And the same after each round of a run that is resumed."""
    pytest.importorskip("rouge_score")
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    asked = {"run.generate": 4, "run.max-tokens": 6, "run.choices": str(questions)}
    changes = asked | {"method": "slora", "run.eval-plain": True}
    config = make(folders["llama"], dialogues, tmp_path / "run", **changes)
    directory = start(config, Grid(config, nodes=2))
    names = ("exact_match", "rouge_l", "choice_accuracy")
    trainer = Trainer(parse(config))
    asked_for = trainer.data.tokenised.asked
    assert len(asked_for) == 4
    rounds = events(directory, "round")
    for done in rounds:
        assert {
            f"{prefix}{n}" for prefix in ("", "plain_") for n in names
        } <= done.keys()
        assert done["exact_match"] * 4 == round(done["exact_match"] * 4)
        assert done["choice_accuracy"] in (0, 0.5, 1)
    found = summary(directory)
    assert [found[n] for n in names] == [rounds[-1][n] for n in names]
    assert found["phases"]["lora"]["rouge_l"] == rounds[-1]["rouge_l"]
    card = next(directory.glob("*/README.md")).read_text()
    assert f"ROUGE-L {found['rouge_l']:.3f}, choice accuracy" in card

    def first(dialogue: list[dict[str, str]]) -> str:
        return "\n".join(
            filter(None, (dialogue[0]["content"], dialogue[0].get("input")))
        )

    answers = predict_texts(directory, "averaged", [first(d) for d in asked_for])
    expected = [d[-1]["content"].split() for d in asked_for]
    given = [answer.facts["response"].split()[:6] for answer in answers]
    right = sum(a == b for a, b in zip(given, expected, strict=True))
    assert found["exact_match"] == right / 4

    config = elsewhere(config)
    stopped = stop(config, 2)
    go_on(config)
    assert_same(stopped, directory)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"run.choices": "/nowhere/questions.jsonl"}, "questions.jsonl does not exist"),
        ({"data.labels": "a,b", "data.name": "node"} | OWN, "data.labels is 'a,b'"),
        ({"method": "head"}, "finds none for causal-lm"),
        ({"method": "bitfit"}, "finds none for causal-lm"),
        ({"clients.count": 4, "clients.per-round": 4}, "the values of the column"),
        ({"data.response": "answer"}, "data.response names 'answer'; the columns are"),
        ({"data.response": "input"}, "'input'; allowed: a column that data.text lacks"),
        ({"clients.by": "region"}, "clients.by names 'region'; the columns are"),
        ({"data.messages": "chat"}, "data.messages names 'chat'; the columns are"),
        ({"data.template": "chat"}, "no chat template; allowed: alpaca, plain"),
        ({"train.head-lr": 0.5}, "train.head-lr is 0.5; allowed: 0, since model"),
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
