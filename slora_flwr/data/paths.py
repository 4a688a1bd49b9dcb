"""The paths that run config values name, made absolute.

A run need not start in the folder where its config was given, and its `config.toml` can
be run again from any.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from slora_flwr.common.files import below_assets, expand
from slora_flwr.config import EMBEDDED_MODELS, OWN_DATA, Value
from slora_flwr.data.presets import DIALOGUES, PRESETS
from slora_flwr.data.shared_files import FORMATS

_NAMES = {"model.name": "models", "data.name": "data"}
_KNOWN = (*EMBEDDED_MODELS, OWN_DATA, *PRESETS, *DIALOGUES)


def make_absolute(values: Mapping[str, Value]) -> dict[str, Value]:
    """Return flat run config values with paths from the current folder made absolute.

    What may name something else than a file or folder here stays as it is.
    """
    return {key: _make_absolute(key, values) for key in values}


def _make_absolute(key: str, values: Mapping[str, Value]) -> Value:
    value = values[key]
    if not isinstance(value, str) or not value or value.startswith("~"):
        return value
    if "://" in value:  # an address, which is refused without repeating it
        return value
    is_path = False
    if key in ("run.dir", "run.resume"):
        is_path = True
    elif key in _NAMES:
        is_path = os.path.exists(value) and not _is_known(key, value)
    elif key in ("data.train", "data.test") and "data.name" in values:
        name = str(values["data.name"])
        is_path = name == OWN_DATA or (
            Path(value).suffix in FORMATS and not _is_folder(name)
        )
    return str(Path(value).absolute()) if is_path else value


def _is_known(key: str, name: str) -> bool:
    """Return whether a name is a known one, or is found below `$SLORA_ASSETS`."""
    return name in _KNOWN or below_assets(_NAMES[key], name) is not None


def _is_folder(data: str) -> bool:
    """Return whether splits are files in the folder that `data.name` names."""
    if not data:
        return False
    return os.path.isdir(expand(data)) or below_assets("data", data) is not None
