"""Exported files: a whole model as transformers writes it, labels, a tokeniser."""

import json
from pathlib import Path
from typing import Any

from slora_flwr.backbone.families import checkpoint_state
from slora_flwr.backbone.load import Backbone

CLASSES_FILE = "classes.json"


def export_model(folder: Path, backbone: Backbone, classes: list[str]) -> None:
    """Write the whole model with its present weights, in transformers' format."""
    folder.mkdir(parents=True, exist_ok=True)
    config = backbone.model.config
    if classes:
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: i for i, name in enumerate(classes)}
    state = checkpoint_state(backbone.model)
    backbone.model.save_pretrained(str(folder), state_dict=state)


def export_classes(folder: Path, classes: list[str]) -> None:
    """Write the label names as JSON, in the order of class ids."""
    (folder / CLASSES_FILE).write_text(
        json.dumps(classes, indent=1) + "\n", encoding="utf-8"
    )


def read_classes(folder: Path) -> list[str]:
    """Return the label names of an export, in the order of class ids; none without.

    A language model has none.
    """
    if not (folder / CLASSES_FILE).exists():
        return []
    return [*map(str, json.loads((folder / CLASSES_FILE).read_text(encoding="utf-8")))]


def export_tokenizer(folder: Path, tokenizer: Any, length: int | None) -> None:
    """Write a tokeniser's files, without what its last call has set.

    Parameters
    ----------
    folder : Path
        Where to.
    tokenizer : transformers.PreTrainedTokenizerFast
        The tokeniser. Nothing of it changes but what its last call has set.
    length : int or None
        The most tokens of a text, to which the written tokeniser truncates; None for
        the tokeniser's own.
    """
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    before = tokenizer.model_max_length
    if length is not None:
        tokenizer.model_max_length = length
    try:
        tokenizer.save_pretrained(str(folder))
    finally:
        tokenizer.model_max_length = before
