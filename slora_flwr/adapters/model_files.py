"""Exported files: a whole model as transformers writes it, and its label names."""

import json
from pathlib import Path

from slora_flwr.backbone.families import checkpoint_state
from slora_flwr.backbone.load import Backbone


def export_model(folder: Path, backbone: Backbone, classes: list[str]) -> None:
    """Write the whole model with its present weights, in transformers' format."""
    folder.mkdir(parents=True, exist_ok=True)
    config = backbone.model.config
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: i for i, name in enumerate(classes)}
    state = checkpoint_state(backbone.model)
    backbone.model.save_pretrained(str(folder), state_dict=state)
    backbone.tokenizer.save_pretrained(str(folder))


def export_classes(folder: Path, classes: list[str]) -> None:
    """Write the label names as JSON, in the order of class ids."""
    (folder / "classes.json").write_text(
        json.dumps(classes, indent=1) + "\n", encoding="utf-8"
    )
