"""Exported low-rank states in PEFT's format, and the patch of their base."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slora_flwr.adapters.loading import PATCHED_ADAPTER, UNPACKED_ADAPTER, Loading
from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.backbone.families import is_conv1d
from slora_flwr.backbone.load import Backbone, find_targets
from slora_flwr.backbone.quantised import dequantise
from slora_flwr.common.tensors import State

if TYPE_CHECKING:
    # Checking a run config must not wait for PEFT's import, which takes seconds.
    from peft import PeftModel
    from transformers import PreTrainedModel

PATCH_FILE = "base_patch.safetensors"
PATCHED_FILE = "adapter_over_patch.safetensors"
# PEFT names it when it refuses the adapter.
PATCHED_TYPE = "LORA over base_patch.safetensors, which README.md tells how to load"


def export_adapter(
    folder: Path,
    backbone: Backbone,
    state: State,
    rank: int,
    scaling: float,
    base: BaseWeights | None,
) -> Loading:
    """Write a low-rank state in PEFT's format, with a base patch if needed.

    If the base subtracts s·B_0·A_0 (`residual`), the adapter is written with twice the
    rank, [B, -B_0]·[A; A_0], as PEFT does for PiSSA. The base then differs from the
    checkpoint only by the sparse phase's values, which `base_patch.safetensors` holds.
    If rounds have changed the base, the file holds whole matrices. Then the adapter's
    own file has a name that PEFT does not look for, and `adapter_config.json` a type
    that it refuses: without the patch the adapter computes something else.

    Parameters
    ----------
    folder : Path
        Destination; created if missing.
    backbone : Backbone
        The backbone with W_0 and nothing attached. It cannot be used afterwards.
    state : State
        State of the low-rank adapter, including A.
    rank, scaling : int, float
        The adapter's rank and s.
    base : BaseWeights or None
        The base; None for W_0.

    Returns
    -------
    Loading
        How it is loaded.
    """
    # Checking a run config must not wait for PEFT's import, which takes seconds.
    from peft import LoraConfig

    from slora_flwr.adapters.peft_layers import write_peft

    rank *= 2 if base is not None and base.b else 1
    config = LoraConfig(
        r=rank,
        lora_alpha=scaling * rank,  # type: ignore[arg-type]
        target_modules=list(backbone.targets),
        init_lora_weights=False,
    )
    factors = {}
    for name in backbone.targets:
        a, b = state[f"{name}.lora_A"], state[f"{name}.lora_B"]
        if base is not None and base.b:
            a = torch.cat([a, base.a[name]])
            b = torch.cat([b, -base.b[name]], dim=1)
        factors[f"{name}.lora_A.default.weight"] = a
        factors[f"{name}.lora_B.default.weight"] = b
    loading = write_peft(folder, backbone, config, state, factors)
    arrays: dict[str, Tensor] = {}
    if base is not None:
        for name, positions in base.positions.items():
            # Unpacked, the weights of stock libraries too are those of linear layers.
            if is_conv1d(backbone.targets[name]) and not backbone.quantize:
                rows, columns = np.divmod(positions, backbone.targets[name].in_features)
                positions = columns * backbone.targets[name].out_features + rows
            arrays[f"{name}.weight.positions"] = torch.from_numpy(positions)
            arrays[f"{name}.weight.values"] = base.values[name].contiguous()
        for name, weight in base.weights.items():
            conv1d = is_conv1d(backbone.targets[name])
            weight = weight.T.contiguous() if conv1d else weight
            arrays[f"{name}.weight.values"] = weight
    if not arrays:
        return loading
    save_file(arrays, folder / PATCH_FILE, {"base": backbone.digest})
    _refuse_stock(folder)
    return UNPACKED_ADAPTER if backbone.quantize else PATCHED_ADAPTER


def _refuse_stock(folder: Path) -> None:
    """Have PEFT and others refuse an adapter whose base is not the checkpoint."""
    (folder / "adapter_model.safetensors").rename(folder / PATCHED_FILE)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["peft_type"] = PATCHED_TYPE
    config["base_model_name_or_path"] += f" + {PATCH_FILE}"
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def merge_adapter(
    backbone: Backbone, state: State, scaling: float, base: BaseWeights | None
) -> None:
    """Give a backbone the weights that a low-rank state computes with, in float32.

    Parameters
    ----------
    backbone, state, base
        As for `export_adapter`.
    scaling : float
        The adapter's s.
    """
    if backbone.quantize:
        dequantise(backbone.model)
        names, linear = list(backbone.targets), find_targets(backbone.model)
        backbone.targets = {name: linear[name] for name in names}
    frozen = base.apply(backbone) if base is not None else {}
    backbone.model.float()
    with torch.no_grad():
        for name, parameter in backbone.head.items():
            parameter.copy_(state[name])
        for name, module in backbone.targets.items():
            a, b = f"{name}.lora_A", f"{name}.lora_B"
            # In float64, where equal factors cancel to less than float32 shows.
            product = state[b].double() @ state[a].double()
            if b in frozen:
                product -= frozen[b].double() @ frozen[a].double()
            weight = module.weight
            weight.copy_(weight.double() + scaling * product.to(weight.device))


def load_adapter(model: "PreTrainedModel", folder: Path) -> "PeftModel":
    """Put an exported adapter on a checkpoint, with its base patch if there is one.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The checkpoint, loaded by transformers for as many labels. It is changed.
    folder : Path
        The export.

    Returns
    -------
    peft.PeftModel
        The model that the run evaluated.
    """
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict

    if not (folder / PATCH_FILE).is_file():
        return PeftModel.from_pretrained(model, str(folder))
    from slora_flwr.adapters.peft_layers import wrap_peft

    apply_base_patch(model, folder / PATCH_FILE)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"peft_type": "LORA", "base_model_name_or_path": None}
    loaded = wrap_peft(model, LoraConfig.from_peft_type(**config))
    set_peft_model_state_dict(loaded, load_file(folder / PATCHED_FILE))
    return loaded.eval()


def apply_base_patch(model: nn.Module, path: Path) -> None:
    """Change a checkpoint's weights to the base that an exported adapter stands on.

    Parameters
    ----------
    model : nn.Module
        The checkpoint, loaded by transformers and not yet wrapped by PEFT.
    path : Path
        Path of `base_patch.safetensors`.

    Raises
    ------
    ValueError
        If the checkpoint's weights are packed in 8 or 4 bits.
    """
    with safe_open(path, "pt") as file, torch.no_grad():
        names = {key.rsplit(".", 1)[0] for key in file.keys()}  # noqa: SIM118
        for name in names:
            weight = model.get_parameter(name)
            if not weight.is_floating_point():
                raise ValueError(
                    f"{name} is {weight.dtype}; allowed: what model.dequantize() makes "
                    "of packed weights"
                )
            values = file.get_tensor(f"{name}.values").to(weight.dtype)
            if values.shape == weight.shape:
                weight.copy_(values)
            else:
                positions = file.get_tensor(f"{name}.positions")
                weight.view(-1).index_copy_(0, positions, values)
