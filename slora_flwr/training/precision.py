"""The precision in which a process computes with the backbone."""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

from slora_flwr.backbone.load import Backbone
from slora_flwr.config import RunConfig

# Values of oneDNN's own limit on instructions that leave bf16 products out.
_WITHOUT_BF16 = {
    "SSE41",
    "AVX",
    "AVX2",
    "AVX2_VNNI",
    "AVX2_VNNI_2",
    "AVX512_CORE",
    "AVX512_CORE_VNNI",
}


def precision_of(backbone: Backbone, precision: str) -> AbstractContextManager[object]:
    """Return the context of a forward pass: bf16 autocast, or none.

    Parameters
    ----------
    backbone : Backbone
        The resident backbone.
    precision : str
        `train.precision`.
    """
    device = backbone.device
    is_bf16 = backbone.dtype == torch.bfloat16
    if is_bf16 or resolve_precision(precision, device) == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def precision_on(config: RunConfig, device: torch.device) -> str:
    """Return the precision in which a run computes on a device, for its records."""
    if config.model.dtype == "bfloat16":  # which only multiplies with bf16
        return "bf16"
    return resolve_precision(config.train.precision, device)


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return the precision on a device, `float32` or `bf16`, which `auto` leaves open.

    `auto` is bf16 where the device multiplies it natively.
    """
    if precision != "auto":
        return precision
    return "bf16" if multiplies_bf16(device.type) else "float32"


@cache
def multiplies_bf16(device: str) -> bool:
    """Return whether the machine has instructions for bf16 products on a device type.

    Elsewhere they are emulated, and take longer than those of float32.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return False
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", ""))
    if limit.upper() in _WITHOUT_BF16:
        return False
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
