"""Models in GGUF files, which hold a language model quantised, with its tokenizer."""

from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slora_flwr.common.files import expand
from slora_flwr.config import ConfigError

SUFFIX = ".gguf"


def is_gguf(name: str) -> bool:
    """Return whether `model.name` is a GGUF file that is there."""
    return name.endswith(SUFFIX) and expand(name).is_file()


def gguf_source(name: str) -> dict[str, str]:
    """Return the arguments by which transformers reads a GGUF file.

    Raises
    ------
    ConfigError
        If the package that reads it is absent.
    """
    if find_spec("gguf") is None:
        raise ConfigError(
            f"model.name is {name!r}, and this environment lacks the package gguf, "
            "which reads it: pip install gguf"
        )
    path = expand(name)
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def public_folder(name: str) -> str:
    """Return how exports call a GGUF file: by the folder that is made of it."""
    return f"./{Path(name).stem}"


def load_dequantised(family: Any, described: Any, **arguments: Any) -> tuple[Any, Any]:
    """Return a model with a GGUF file's weights, and what transformers tells of them.

    The model that transformers itself returns counts as quantised, and refuses to be
    saved or cast. This one has its values, and is an ordinary one.

    Parameters
    ----------
    family : type
        An auto class of transformers.
    described : transformers.PreTrainedConfig
        The file's own.
    **arguments
        Further arguments of `from_pretrained`.
    """
    plain = deepcopy(described)
    found, info = family.from_pretrained(
        config=described, trust_remote_code=False, **arguments
    )
    model = family.from_config(plain, dtype=found.dtype)
    model.load_state_dict(found.state_dict())
    return model, info
