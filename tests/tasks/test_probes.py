"""Generated responses and multiple choice: the figures by hand, and what is refused."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from slora_flwr.backbone.load import Backbone, load_backbone
from slora_flwr.config import ConfigError, DataConfig, ModelConfig, parse
from slora_flwr.data.dialogues import Dialogue, answered, ask
from slora_flwr.data.texts import prompts_of
from slora_flwr.tasks.causal_lm import CausalLM
from slora_flwr.tasks.classification import Classification
from slora_flwr.tasks.multiple_choice import Question, read_questions
from tests.support.causal import save_language_model

QUESTIONS: list[dict[str, Any]] = [
    {"question": "w5 w6", "choices": ["w7", "w8 w9 w10"], "answer": 1},
    {"question": "w9", "choices": ["w20", "w21", "w22"], "answer": "w20"},
    {"question": "w30 w31 w32", "choices": ["w7 w8", "w40"], "answer": 0},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save_language_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return load_backbone(ModelConfig(name=str(folder)), None, 0, task=CausalLM())


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def probe(backbone: Backbone, asked: list[Dialogue], **run: Any) -> dict[str, float]:
    keys = {f"run.{key.replace('_', '-')}": value for key, value in run.items()}
    config = parse({"task": "causal-lm", **keys})
    task, data = CausalLM(), DataConfig(max_length=16)
    encoder = task.encoder(data, backbone.tokenizer)
    found: dict[str, float] = {}
    with torch.inference_mode():
        for measure in task.probes(config, encoder, asked):
            found |= measure(backbone.model.eval())
    return found


def test_a_choice_is_the_most_likely_response(
    folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    """Against transformers' own logits of single, unpadded texts."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    right = 0
    for row in QUESTIONS:
        scores = []
        for choice in row["choices"]:
            ids = backbone.tokenizer(f"{row['question']} {choice} [SEP]")["input_ids"]
            start = len(row["question"].split())
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(
                sum(float(logits[i - 1, ids[i]]) for i in range(start, len(ids)))
            )
        answer = row["answer"]
        known = answer if isinstance(answer, int) else row["choices"].index(answer)
        right += scores.index(max(scores)) == known
    path = write(tmp_path / "questions.jsonl", QUESTIONS)
    assert probe(backbone, [], choices=path) == {"choice_accuracy": right / 3}
    # Each question has another right answer, so that each must count.
    for i, row in enumerate(QUESTIONS):
        for answer in range(len(row["choices"])):
            rows = [q | {"answer": answer} if q == row else q for q in QUESTIONS]
            found = probe(backbone, [], choices=write(tmp_path / f"{i}.jsonl", rows))
            assert found["choice_accuracy"] * 3 == pytest.approx(
                right
                - hits(backbone, row, tmp_path)
                + hits(backbone, row | {"answer": answer}, tmp_path)
            )


def hits(backbone: Backbone, row: dict[str, Any], folder: Path) -> float:
    path = write(folder / "one.jsonl", [row])
    return probe(backbone, [], choices=path)["choice_accuracy"]


def test_responses_are_compared_by_words(backbone: Backbone) -> None:
    pytest.importorskip("rouge_score")
    prompts = ["w5 w6", "w7 w8 w9", "w10"]
    task = CausalLM()
    encoder = task.encoder(DataConfig(max_length=16), backbone.tokenizer)
    model = backbone.model.eval()
    said = [
        answer.response.split()[:4]
        for answer in task.answer(model, encoder, [], prompts_of(prompts))
    ]
    # Right but for blanks; the first half of what is said; something else.
    expected = ["  ".join(said[0]), " ".join(said[1][:2]), "w3 w3 w3"]
    asked = [
        answered(ask([prompt]), response)
        for prompt, response in zip(prompts, expected, strict=True)
    ]
    asked.append(answered([], "without a prompt"))
    found = probe(backbone, asked, generate=9, max_tokens=4)
    assert [len(words) for words in said] == [4, 4, 4]
    assert found["exact_match"] == pytest.approx(1 / 3)
    # Precision 2 / 4 and recall 1 make 2 / 3.
    assert found["rouge_l"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_rouge_leaves_logging_as_it_was(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rouge_score")
    # With a handler at the root, each line of the run's log would appear twice.
    monkeypatch.setattr(logging.root, "handlers", [])
    probe(backbone, [answered(ask(["w5"]), "w6")], generate=1, max_tokens=2)
    assert not logging.root.handlers


def test_rouge_is_asked_for_by_name(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ConfigError, match=r"run\.generate is 2, .* needs rouge-score"):
        probe(backbone, [answered(ask(["w5"]), "w6")], generate=2)


@pytest.mark.parametrize("asked", [[], [answered([], "w5 w6")]])
def test_without_prompts_nothing_can_be_generated(
    backbone: Backbone, asked: list[Dialogue]
) -> None:
    pytest.importorskip("rouge_score")
    with pytest.raises(ConfigError, match=r"run\.generate is 2; allowed: 0, since the"):
        probe(backbone, asked, generate=2)


def test_a_long_prompt_leaves_room_for_a_response(backbone: Backbone) -> None:
    """The model has 40 positions."""
    task = CausalLM()
    encoder = task.encoder(DataConfig(max_length=40), backbone.tokenizer)
    long = " ".join(["w5"] * 60)
    [answer] = task.answer(backbone.model.eval(), encoder, [], prompts_of([long]))
    assert answer.response


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"question": " "}, "row 2 has no question"),
        ({"choices": "ab"}, "has no choices; allowed: a list"),
        ({"choices": ["a"]}, r"has the choices \['a'\]; allowed: two or more"),
        ({"choices": ["a", "a"]}, "two or more texts that differ"),
        ({"choices": ["a", 3]}, "two or more texts that differ"),
        ({"choices": ["a", "\ud800"]}, "characters that UTF-8 lacks"),
        ({"answer": 2}, "has the answer 2; allowed: one of the choices, or its number"),
        ({"answer": -1}, "has the answer -1"),
        ({"answer": True}, "has the answer True"),
        ({"answer": "c"}, "has the answer c"),
    ],
)
def test_what_is_no_question_is_named(
    tmp_path: Path, row: dict[str, Any], told: str
) -> None:
    good = {"question": "w5", "choices": ["a", "b"], "answer": 0}
    with pytest.raises(ConfigError, match=told):
        read_questions(write(tmp_path / "a.jsonl", [good, good | row]))


def test_a_file_of_questions_has_its_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "w5", "answer": 0}])
    with pytest.raises(
        ConfigError, match="no column choices; its columns are question"
    ):
        read_questions(path)
    good = {"question": "w5", "choices": ["a", "b"], "answer": "b"}
    path = write(tmp_path / "a.jsonl", [good])
    assert read_questions(path) == [Question("w5", ["a", "b"], 1)]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.generate", 3),
        ("run.choices", "/srv/questions.jsonl"),
        ("data.response", "answer"),
        ("data.messages", "chat"),
    ],
)
def test_a_classifier_generates_nothing(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key} is .*since task is classification"):
        Classification().check(parse({key: value}))
