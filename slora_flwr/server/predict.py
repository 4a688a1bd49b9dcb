"""Answers of a finished run's model to texts."""

from pathlib import Path

import torch

from slora_flwr.common.files import expand
from slora_flwr.common.text import is_unicode
from slora_flwr.config import refuse
from slora_flwr.data.data_sets import read_unlabelled
from slora_flwr.data.texts import Texts, prompts_of
from slora_flwr.server.export import KeptState
from slora_flwr.tasks.base import Answer
from slora_flwr.tasks.choice import find_task
from slora_flwr.training.precision import precision_of


def predict_texts(
    run: Path,
    which: str,
    texts: list[str],
    file: Path | None = None,
    most: int | None = None,
) -> list[Answer]:
    """Return the answers of a run's state to texts.

    Parameters
    ----------
    run, which
        As for `slora_flwr.server.export.export_run`.
    texts : list[str]
        The texts.
    file : Path or None
        A file of texts in their place: a line each in a `.txt` file, else in the
        columns in which the run's data has its texts, prompts or conversations.
    most : int or None
        The most tokens of a response; None for the task's own.

    Raises
    ------
    RunError
        If it is no run directory, or cannot be read.
    ConfigError
        If the run keeps no such state, the file cannot be read, a text is not
        Unicode, or answers have no tokens and `most` is given.
    """
    kept = KeptState.read(run, which)
    config = kept.config
    dialogues = not find_task(config).has_classes
    if file is not None:
        given = read_unlabelled(config.data, expand(file), dialogues=dialogues)
    else:
        given = prompts_of(texts) if dialogues else Texts(texts, [""] * len(texts))
    return answer_texts(kept, given, most)


def answer_texts(
    kept: KeptState, texts: Texts, most: int | None = None
) -> list[Answer]:
    """Return the answers of a kept state to texts; its adapter is attached.

    Raises
    ------
    ConfigError
        If a text is not Unicode.
    """
    for text in texts.texts:
        if not is_unicode(text):
            raise refuse("text", text, "characters that UTF-8 has")
    kept.model.adapter.load(kept.state)
    backbone, task = kept.model.backbone, find_task(kept.config)
    model, encoder = backbone.model.eval(), kept.data.encoder
    with torch.inference_mode(), precision_of(backbone, kept.config.train.precision):
        return list(task.answer(model, encoder, kept.classes, texts, most))
