"""PEFT's layers in a resident backbone, and files in PEFT's format."""

import warnings
from collections.abc import Mapping
from copy import copy
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from slora_flwr.adapters.loading import ADAPTER, Loading
from slora_flwr.backbone.families import is_conv1d
from slora_flwr.backbone.load import Backbone


def wrap_peft(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Insert PEFT's layers, without two warnings that do not apply."""
    with warnings.catch_warnings():
        # A model stays marked as wrapped after `unload`.
        warnings.filterwarnings("ignore", message=".*for a second time")
        # PEFT reads a property that transformers has renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def write_peft(
    folder: Path,
    backbone: Backbone,
    config: PeftConfig,
    head: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
) -> Loading:
    """Write an adapter and the head in PEFT's format.

    Parameters
    ----------
    folder : Path
        Destination; created if missing.
    backbone : Backbone
        The backbone with W_0 and nothing attached. It cannot be used afterwards.
    config : PeftConfig
        The adapter's config. The task and the modules that hold the head are added.
    head : Mapping[str, Tensor]
        The head's values, named as in the backbone; other names are ignored.
    values : Mapping[str, Tensor]
        The adapter's values, named as PEFT names their parameters, such as
        `<module>.lora_A.default.weight`.

    Returns
    -------
    Loading
        How it is loaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = copy(config)
    config.task_type = TaskType(backbone.task.peft_type)
    config.modules_to_save = _head_modules(backbone) or None  # type: ignore[attr-defined]
    with torch.no_grad():
        for name, parameter in backbone.head.items():
            parameter.copy_(head[name])
        model = wrap_peft(backbone.model, config)
        for name, tensor in values.items():
            model.get_parameter(f"base_model.model.{name}").copy_(tensor)
    # PEFT's name for layers whose weights the checkpoint holds transposed.
    config.fan_in_fan_out = any(map(is_conv1d, backbone.targets.values()))  # type: ignore[attr-defined]
    # PEFT holds the names in a set, whose order differs between processes.
    config.target_modules = sorted(config.target_modules)  # type: ignore[attr-defined]
    # Otherwise PEFT looks up the checkpoint to see if its vocabulary was changed.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return ADAPTER


def _head_modules(backbone: Backbone) -> list[str]:
    """Return the names of the head's modules, the outermost that hold nothing else."""
    modules = set()
    for parameter in backbone.head:
        top = parameter.split(".", 1)[0]
        inside = [n for n, _ in backbone.model.named_parameters() if _is_in(n, top)]
        whole = all(name in backbone.head for name in inside)
        modules.add(top if whole else parameter.rsplit(".", 1)[0])
    return sorted(modules)


def _is_in(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")
