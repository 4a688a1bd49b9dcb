"""Exported low-rank states in PEFT's format, and the patch of their base."""

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.backbone.families import is_conv1d
from slora_flwr.backbone.load import Backbone
from slora_flwr.common.tensors import State

PATCH_FILE = "base_patch.safetensors"


def export_adapter(
    folder: Path,
    backbone: Backbone,
    state: State,
    rank: int,
    scaling: float,
    base: BaseWeights | None,
) -> None:
    """Write a low-rank state in PEFT's format, with a base patch if needed.

    If the base subtracts s·B_0·A_0 (`residual`), the adapter is written with twice the
    rank, [B, -B_0]·[A; A_0], as PEFT does for PiSSA. The base then differs from the
    checkpoint only by the sparse phase's values, which `base_patch.safetensors` holds.
    If rounds have changed the base, the file holds whole matrices.

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
    write_peft(folder, backbone, config, state, factors)
    if base is not None:
        arrays: dict[str, Tensor] = {}
        for name, positions in base.positions.items():
            if is_conv1d(backbone.targets[name]):
                rows, columns = np.divmod(positions, backbone.targets[name].in_features)
                positions = columns * backbone.targets[name].out_features + rows
            arrays[f"{name}.weight.positions"] = torch.from_numpy(positions)
            arrays[f"{name}.weight.values"] = base.values[name].contiguous()
        for name, weight in base.weights.items():
            conv1d = is_conv1d(backbone.targets[name])
            weight = weight.T.contiguous() if conv1d else weight
            arrays[f"{name}.weight.values"] = weight
        if arrays:
            save_file(arrays, folder / PATCH_FILE, {"base": backbone.digest})


def apply_base_patch(model: nn.Module, path: Path) -> None:
    """Change a checkpoint's weights to the base that an exported adapter stands on.

    Parameters
    ----------
    model : nn.Module
        The checkpoint, loaded by transformers and not yet wrapped by PEFT.
    path : Path
        Path of `base_patch.safetensors`.
    """
    with safe_open(path, "pt") as file, torch.no_grad():
        names = {key.rsplit(".", 1)[0] for key in file.keys()}  # noqa: SIM118
        for name in names:
            weight = model.get_parameter(name)
            values = file.get_tensor(f"{name}.values").to(weight.dtype)
            if values.shape == weight.shape:
                weight.copy_(values)
            else:
                positions = file.get_tensor(f"{name}.positions")
                weight.view(-1).index_copy_(0, positions, values)
