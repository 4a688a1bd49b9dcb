"""The embedded models: a tiny BERT and a tiny Llama of the standard library's own text.

A package separate from `slora_flwr`, since a Flower app bundle cannot hold weights:
`pip install` puts it on every node. `pretrain.py` made the files in this folder,
`tools/pretrain_llama.py` those of `llama`. Each says how, and what came of it. The
templates of pages, which a bundle cannot hold either, are in `templates`.
"""

from pathlib import Path

_FOLDERS = {"embedded": "", "embedded-llama": "llama"}


def folder(name: str = "embedded") -> Path:
    """Return the folder that `from_pretrained` loads a model and tokenizer from.

    Parameters
    ----------
    name : str
        `embedded` or `embedded-llama`, as in `model.name`.
    """
    return Path(__file__).resolve().parent / _FOLDERS[name]


def templates() -> Path:
    """Return the folder of the templates of pages."""
    return Path(__file__).resolve().parent / "templates"
