"""Frozen linear layers in 8 or 4 bits, which bitsandbytes holds and computes with."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slora_flwr.common.quiet import quiet_bitsandbytes
from slora_flwr.common.text import redact
from slora_flwr.config import ConfigError, refuse

# Of `model.quantize` 4bit: QLoRA's type (arXiv 2305.14314), and bitsandbytes' usual
# number of weights that share a scale.
TYPE_4BIT = "nf4"
_BLOCK = 64
# Of 8bit: transformers' default. Inputs beyond it are multiplied in 16 bits, where the
# others are rounded to 8 (LLM.int8(), arXiv 2208.07339).
_THRESHOLD = 6.0
# Of a product, relative: bf16 products are off by some 0.003, those of wrong scales by
# 0.3.
_WRONG = 0.02


def quantise(
    model: Any, linear: Mapping[str, nn.Linear], kind: str, device: torch.device
) -> None:
    """Replace linear layers by bitsandbytes' layers, on a device.

    They hold what transformers' `BitsAndBytesConfig` would make of the same weights.
    These are packed on the CPU: on any device the layers then hold the same bits.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model, on the CPU and frozen. It is marked as transformers marks its own.
    linear : Mapping[str, nn.Linear]
        The layers by their names in the model.
    kind : str
        `8bit` or `4bit`.
    device : torch.device
        Where the layers are to be.

    Raises
    ------
    ConfigError
        If bitsandbytes is missing, or cannot compute on the device, or computes with
        other weights than the layers hold.
    """
    library = _library(kind)
    _try(library, kind, device)
    tried: set[tuple[int, int]] = set()
    for name, module in linear.items():
        packed = _pack(library, module, kind, device)
        if (shape := (module.out_features, module.in_features)) not in tried:
            _check_product(packed, kind, name)
            tried.add(shape)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            # Else they keep the checkpoint's file mapped, and all of it in memory.
            tensor.data = tensor.data.clone()
    setattr(model, f"is_loaded_in_{kind}", True)


def _library(kind: str) -> Any:
    quiet_bitsandbytes()
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(
            f"model.quantize is {kind!r}, and this environment lacks the package "
            "bitsandbytes: pip install 'slora-flwr[quantize]'"
        ) from error
    return bitsandbytes.nn


def _pack(library: Any, module: nn.Linear, kind: str, device: torch.device) -> Any:
    """Return the layer that holds a linear layer's weight in 8 or 4 bits."""
    sizes = (module.in_features, module.out_features, module.bias is not None)
    weight, dtype = module.weight.detach(), module.weight.dtype
    if kind == "4bit":
        packed = library.Linear4bit(
            *sizes,
            compute_dtype=dtype,
            compress_statistics=False,
            quant_type=TYPE_4BIT,
            device="meta",
        )
        held = library.Params4bit(
            weight,
            requires_grad=False,
            blocksize=_BLOCK,
            compress_statistics=False,
            quant_type=TYPE_4BIT,
            module=packed,
        )
        # On some CPUs an evaluation would pack the weight anew, to multiply it in bf16,
        # and have no gradients from then on.
        packed.support_avx512bf16_for_cpu = False
    else:
        packed = library.Linear8bitLt(
            *sizes, has_fp16_weights=False, threshold=_THRESHOLD, device="meta"
        )
        held = library.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        # The layer rounds its bias, for good, to the type of an input.
        packed.register_forward_pre_hook(lambda _, given: (given[0].to(dtype),))
    # Packed by its first move, even to where it is.
    packed.weight = held.to("cpu").to(device)
    packed.bias = module.bias
    if getattr(module, "is_conv1d", False):
        packed.is_conv1d = True
    return packed.train(module.training)


def _try(library: Any, kind: str, device: torch.device) -> None:
    """Raise ConfigError if a layer cannot compute outputs and gradients."""
    try:
        layer = _pack(library, nn.Linear(_BLOCK, _BLOCK, bias=False), kind, device)
        x = torch.ones(1, _BLOCK, device=device, requires_grad=True)
        layer(x).sum().backward()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        why = f"bitsandbytes cannot compute on {device.type} here"
        allowed = f"empty, since {why} ({redact(error)})"
        raise refuse("model.quantize", kind, allowed) from error


def _check_product(packed: nn.Linear, kind: str, name: str) -> None:
    """Raise ConfigError if a layer's output is not that of the weight it holds.

    On some CPUs bitsandbytes takes the scales of other values, where 64 does not divide
    a row of the weight.
    """
    made = torch.Generator().manual_seed(0)
    # Signs, which 8 bits hold as they are.
    x = torch.randint(0, 2, (2, packed.in_features), generator=made).float() * 2 - 1
    x = x.to(packed.weight.device)
    right = x @ (_unpack(packed) if kind == "4bit" else weight_of(packed)).T
    if packed.bias is not None:
        right = right + packed.bias.float()
    with torch.inference_mode():
        error = (packed(x).float() - right).norm() / right.norm()
    if not bool(error <= _WRONG):
        shape = f"{packed.out_features} x {packed.in_features}"
        why = f"bitsandbytes computes wrong products with {name}, {shape}, here"
        raise refuse("model.quantize", kind, f"empty, since {why}")


def _unpack(module: nn.Linear) -> Tensor:
    """Return the weight that a layer holds in 4 bits, as the type is defined.

    Two values share a byte, the first in its higher half (QLoRA, section 3).
    """
    held: Any = module.weight
    state, packed = held.quant_state, held.data.flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
    size = module.out_features * module.in_features
    values = state.code[codes][:size].float()
    scales = state.absmax.float().repeat_interleave(state.blocksize)[:size]
    return (values * scales).view(module.out_features, module.in_features)


def is_quantised(module: nn.Linear) -> bool:
    """Return whether a linear layer's weight is packed."""
    return not module.weight.is_floating_point()


def weight_of(module: nn.Linear) -> Tensor:
    """Return the weight that a linear layer computes with, (out, in).

    The weight itself, or a new one if the layer's is packed: its numbers as the layer
    unpacks them, with the values of its sparse terms.
    """
    if not is_quantised(module):
        return module.weight.detach()
    held: Any = module.weight
    if getattr(held, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight: Tensor = dequantize_4bit(held.data, held.quant_state)
    else:
        scales = scales_of(module)
        weight = held.data.float().mul_(scales.unsqueeze(1).mul(1.0 / 127.0))
    for term in getattr(module, "sparse_terms", ()):
        weight = weight.float()
        weight.view(-1)[term.positions] = term.values.detach()
    return weight


def scales_of(module: nn.Linear) -> Tensor:
    """Return the scales of a packed weight, float32."""
    held: Any = module.weight
    if getattr(held, "quant_state", None) is not None:
        scales: Tensor = held.quant_state.absmax
    else:  # The layer takes them from the weight as it is first used.
        state: Any = module.state
        scales = state.SCB if held.SCB is None else held.SCB
    return scales


def packed_bytes(module: nn.Linear, kind: str) -> int:
    """Return the bytes of a linear layer's weight in 8 or 4 bits, with its scales."""
    size = module.out_features * module.in_features
    if kind == "8bit":
        return size + 4 * module.out_features
    # Whole blocks, and a table of the 16 numbers that 4 bits stand for.
    return -(-size // 2) + 4 * -(-size // _BLOCK) + 4 * 16


def dequantise(model: Any) -> None:
    """Replace packed layers by linear ones, whose weights are float32."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_quantised(module):
            sizes = module.in_features, module.out_features
            linear = nn.Linear(*sizes, device="meta")
            weight = weight_of(module).float()
            linear.weight = nn.Parameter(weight, requires_grad=False)
            linear.bias = module.bias
            if getattr(module, "is_conv1d", False):
                linear.is_conv1d = True  # type: ignore[assignment]
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    model.is_loaded_in_8bit = model.is_loaded_in_4bit = False


def stock_config(model: Any, kind: str) -> dict[str, Any]:
    """Return transformers' `quantization_config` that makes the same layers.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model whose layers are quantised.
    kind : str
        `8bit` or `4bit`.
    """
    whole = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not is_quantised(module)
    ]
    found: dict[str, Any] = {
        "quant_method": "bitsandbytes",
        f"load_in_{kind}": True,
        "llm_int8_skip_modules": whole,
    }
    if kind == "4bit":
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        found["bnb_4bit_quant_type"] = TYPE_4BIT
        found["bnb_4bit_compute_dtype"] = dtype
    return found
