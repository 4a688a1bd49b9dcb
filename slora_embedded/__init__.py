"""The embedded model: a tiny BERT pretrained on the standard library's own text.

A package separate from `slora_flwr`, since a Flower app bundle cannot hold weights:
`pip install` puts it on every node. `pretrain.py` made the files in this folder.
"""

from pathlib import Path


def folder() -> Path:
    """Return the folder that `from_pretrained` loads the model and tokenizer from."""
    return Path(__file__).resolve().parent
