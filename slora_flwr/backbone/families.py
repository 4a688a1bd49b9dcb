"""What families of transformers do their own way: positions, layers, experts."""

import torch
from torch import Tensor, nn

from slora_flwr.backbone.quantised import is_quantised, weight_of

# The tables of learned positions that transformers' families have.
_TABLES = ("position_embeddings", "wpe", "embed_positions")


def most_positions(model: nn.Module) -> int | None:
    """Return the longest text that a model's table of positions has room for.

    Returns
    -------
    int or None
        Tokens; None for models whose positions are relative or rotary.
    """
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in _TABLES and isinstance(module, nn.Embedding):
            # OPT's positions start at 2, RoBERTa's after the padding index.
            after_padding = 0 if module.padding_idx is None else module.padding_idx + 1
            skipped = int(getattr(module, "offset", after_padding))
            return module.num_embeddings - skipped
    return None


def to_linear(model: nn.Module) -> None:
    """Replace each Conv1D, GPT-2's layer with a transposed weight, by a linear one."""
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            weight = module.weight.detach()
            inputs, outputs = weight.shape
            linear = nn.Linear(inputs, outputs, device="meta")
            linear.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
            linear.bias = module.bias
            linear.is_conv1d = True  # type: ignore[assignment]
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)


def checkpoint_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights, unpacked, as stock transformers has them.

    What `to_linear` has done is undone.
    """
    state: dict[str, Tensor] = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_quantised(module):
            for part in [key for key in state if key.startswith(f"{name}.")]:
                if part != f"{name}.bias":  # scales lie beside the weight
                    del state[part]
            state[f"{name}.weight"] = weight_of(module)
        if is_conv1d(module):
            state[f"{name}.weight"] = state[f"{name}.weight"].T.contiguous()
    return state


def is_conv1d(module: nn.Module) -> bool:
    """Return whether the checkpoint holds this linear layer's weight transposed."""
    return getattr(module, "is_conv1d", False)


def expert_weights(model: nn.Module) -> dict[str, torch.Size]:
    """Return the weights of a mixture's experts, which lie in arrays of all of them.

    No adapter acts on them, since they are no linear layers of their own. Families name
    them differently, and some lay all experts below one another in a matrix.
    """
    layers = (nn.Linear, nn.Embedding, nn.Conv1d)
    return {
        f"{place}.{name}": parameter.shape
        for place, module in model.named_modules()
        if not isinstance(module, layers)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > (1 if "experts" in place.split(".") else 2)
    }
