"""Answers of a finished run's model to texts."""

from pathlib import Path

import torch

from slora_flwr.common.files import expand
from slora_flwr.common.text import is_unicode
from slora_flwr.config import refuse
from slora_flwr.data.texts import read_unlabelled
from slora_flwr.server.export import KeptState
from slora_flwr.tasks.base import Answer
from slora_flwr.tasks.choice import find_task
from slora_flwr.training.loop import precision_of


def predict_texts(
    run: Path, which: str, texts: list[str], file: Path | None = None
) -> list[Answer]:
    """Return the answers of a run's state to texts.

    Parameters
    ----------
    run, which
        As for `slora_flwr.server.export.export_run`.
    texts : list[str]
        The texts.
    file : Path or None
        A file of further texts: a line each in a `.txt` file, else in the columns in
        which the run's data has its text.

    Raises
    ------
    RunError
        If it is no run directory, or cannot be read.
    ConfigError
        If the run keeps no such state, the file cannot be read, or a text is not
        Unicode.
    """
    kept = KeptState.read(run, which)
    config, model, data = kept.config, kept.model, kept.data
    if file is not None:
        texts = [*texts, *read_unlabelled(config.data, expand(file))]
    for text in texts:
        if not is_unicode(text):
            raise refuse("text", text, "characters that UTF-8 has")
    model.adapter.load(kept.state)
    backbone, task = model.backbone, find_task(config)
    with torch.inference_mode(), precision_of(backbone, config.train.precision):
        answers = task.answer(backbone.model.eval(), data.encoder, kept.classes, texts)
        return list(answers)
