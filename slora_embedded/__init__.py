"""The embedded model: a tiny BERT pretrained on the standard library's own text.

A package apart from `slora_flwr`, because a Flower app bundle cannot hold weights:
`pip install` brings it to every node. `pretrain.py` made the files beside this one.
"""

from pathlib import Path


def folder() -> Path:
    """Return the folder that `from_pretrained` loads the model and tokenizer from."""
    return Path(__file__).resolve().parent
