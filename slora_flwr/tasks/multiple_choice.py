"""Multiple choice: which response a language model holds for the most probable."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slora_flwr.common.files import expand
from slora_flwr.common.text import is_unicode, printable
from slora_flwr.config import ConfigError
from slora_flwr.data.dialogues import answered, ask
from slora_flwr.data.examples import Batch, Examples
from slora_flwr.data.shared_files import read_file
from slora_flwr.data.texts import Texts

COLUMNS = ("question", "choices", "answer")
_BATCH = 16


@dataclass(frozen=True)
class Question:
    """A question, its choices, and which of them is right."""

    text: str
    choices: list[str]
    right: int


class ChoiceProbe:
    """Has a model choose answers to questions.

    `choice_accuracy` is the share of questions whose right choice is the one that the
    model is the most likely to respond with: the sum of the log-likelihoods of its
    tokens and of the end.

    Parameters
    ----------
    encoder : DialogueEncoder
        What makes tokens of dialogues.
    path : str
        The file of questions; see `read_questions`.
    score : Callable
        Returns the log-likelihood of each row's learned tokens, given a model and a
        batch.

    Raises
    ------
    ConfigError
        If the file cannot be read as questions.
    """

    def __init__(
        self, encoder: Any, path: str, score: Callable[[Any, Batch], Tensor]
    ) -> None:
        self._questions, self._score = read_questions(path), score
        dialogues = [
            answered(ask([question.text]), choice)
            for question in self._questions
            for choice in question.choices
        ]
        none = [""] * len(dialogues)
        arrays = encoder.encode(Texts(none, none, dialogues=dialogues))
        labels = np.zeros(len(dialogues), dtype=np.int64)
        self._examples = Examples(**arrays, labels=labels, pad=encoder.pad)

    def __call__(self, model: Any) -> dict[str, float]:
        """Return the metric of a model."""
        found = torch.zeros(len(self._examples))
        for rows in self._examples.in_order_of_length(_BATCH):
            batch = self._examples.batch(rows).to(model.device)
            found[rows] = self._score(model, batch).cpu()
        right, start = 0, 0
        for question in self._questions:
            end = start + len(question.choices)
            right += int(found[start:end].argmax()) == question.right
            start = end
        return {"choice_accuracy": right / len(self._questions)}


def read_questions(given: str) -> list[Question]:
    """Return the questions in a file.

    Its columns are `question`, `choices`, a list of texts, and `answer`: the right
    choice, or its number from 0.

    Raises
    ------
    ConfigError
        If it cannot be read so.
    """
    table = read_file(expand(given), COLUMNS)
    if missing := [name for name in COLUMNS if name not in table.names]:
        raise ConfigError(
            f"run.choices is {given!r}, which has no column {', '.join(missing)}; its "
            f"columns are {', '.join(table.names)}"
        )
    rows = zip(*(table.columns[name] for name in COLUMNS), strict=True)
    found = []
    for number, (text, choices, answer) in enumerate(rows, start=1):
        try:
            found.append(_question(text, choices, answer))
        except ValueError as error:
            raise ConfigError(
                f"run.choices is {given!r}, where row {number} {error}"
            ) from None
    return found


def _question(text: object, choices: object, answer: object) -> Question:
    if not isinstance(text, str) or not text.strip():
        raise ValueError("has no question")
    if not (isinstance(choices, Sequence) and not isinstance(choices, str)):
        raise ValueError("has no choices; allowed: a list of two or more texts")
    texts = [choice for choice in choices if isinstance(choice, str)]
    if len(texts) < max(2, len(choices)) or len({*texts}) < len(texts):
        raise ValueError(
            f"has the choices {printable(choices)}; allowed: two or more texts that "
            "differ"
        )
    if not is_unicode("".join([text, *texts])):
        raise ValueError("has characters that UTF-8 lacks")
    if isinstance(answer, str) and answer in texts:
        return Question(text, texts, texts.index(answer))
    if type(answer) is int and 0 <= answer < len(texts):
        return Question(text, texts, answer)
    raise ValueError(
        f"has the answer {printable(answer)}; allowed: one of the choices, or its "
        f"number from 0 to {len(texts) - 1}"
    )
