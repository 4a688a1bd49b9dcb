"""Bottleneck adapters, at the places of two papers.

`houlsby` (arXiv 1902.00751): two in each block, on what attention and feed-forward give
before the residual is added; the block's normalisations are trained too.
`pfeiffer` (arXiv 2005.00247): one in each block, beside the residual that the last
normalisation gets: y = norm(x + up(relu(down(norm(x))))).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.hooks import RemovableHandle

from slora_flwr.adapters.base import HeadAdapter
from slora_flwr.backbone.load import Backbone, block_modules
from slora_flwr.common.tensors import State
from slora_flwr.config import ConfigError

KINDS = ("houlsby", "pfeiffer")

# Ends of module names, in BERT, RoBERTa and DeBERTa, in DistilBERT, and in ALBERT.
_ATTENTION = (".attention.output.dropout", ".attention.out_lin", ".output_dropout")
_FEED_FORWARD = (".output.dropout", ".ffn.dropout", ".ffn_output")
_LAST_NORM = (".output.LayerNorm", ".output_layer_norm", ".full_layer_layer_norm")

# Both papers begin near the identity.
INITIAL_DEVIATION = 1e-3


class Bottleneck(nn.Module):
    """x -> up(f(down(x))), from `width` features to `inner` and back, in float32."""

    def __init__(self, width: int, inner: int, relu: bool) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        self._between = F.relu if relu else F.gelu
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=INITIAL_DEVIATION)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Give what is added to x."""
        return self.up(self._between(self.down(x.float()))).to(x.dtype)


class BottleneckAdapter(HeadAdapter):
    """Train bottlenecks between the frozen layers of each block.

    The state holds, for each place, `<module>.down.weight`, shape (inner, width),
    `.down.bias`, `.up.weight` and `.up.bias`, and for `houlsby` the normalisations'
    weights and biases.

    Parameters
    ----------
    kind : str
        `houlsby` or `pfeiffer`.
    reduction : int
        Features are divided by it in the bottleneck.
    """

    def __init__(self, kind: str, reduction: int) -> None:
        super().__init__()
        self._kind, self._reduction = kind, reduction

    def known(self) -> State:
        """Copy the normalisations: bottlenecks start at random."""
        return {name: t for name, t in self.state().items() if name in self._norms}

    def _make(self, backbone: Backbone) -> dict[str, nn.Parameter]:
        model = backbone.model
        trained, self._hooks = insert(model, self._kind, self._reduction)
        norms = find_norms(model) if self._kind == "houlsby" else {}
        self._norms = {name: (p, p.detach().clone()) for name, p in norms.items()}
        return trained | norms

    def _restore(self, backbone: Backbone) -> None:
        for hook in self._hooks:
            hook.remove()
        with torch.no_grad():
            for parameter, before in self._norms.values():
                parameter.copy_(before)
        self._hooks, self._norms = [], {}


def insert(
    model: Any, kind: str, reduction: int
) -> tuple[dict[str, nn.Parameter], list[RemovableHandle]]:
    """Put bottlenecks into a model; the handles take them out again.

    Returns
    -------
    dict
        Their parameters by the module's name and `down.weight`, `down.bias`,
        `up.weight` or `up.bias`.
    list
        A handle for each.
    """
    parameters, hooks = {}, []
    device = next(model.parameters()).device
    width, inner = bottleneck_shape(model, reduction)
    for name, module in find_places(model, kind).items():
        bottleneck = Bottleneck(width, inner, relu=kind == "pfeiffer").to(device)
        hook = _after if kind == "houlsby" else _around
        hooks.append(module.register_forward_hook(partial(hook, bottleneck)))
        for part, parameter in bottleneck.named_parameters():
            parameters[f"{name}.{part}"] = parameter
    return parameters, hooks


def bottleneck_shape(model: Any, reduction: int) -> tuple[int, int]:
    """Give a bottleneck's width and inner width."""
    width = int(model.config.hidden_size)
    return width, max(1, width // reduction)


def find_places(model: Any, kind: str) -> dict[str, nn.Module]:
    """Find the modules whose output a bottleneck changes, by name.

    Raises
    ------
    ConfigError
        If the model's blocks are of no known family.
    """
    ends = (*_ATTENTION, *_FEED_FORWARD) if kind == "houlsby" else _LAST_NORM
    found = {
        name: module
        for name, module in block_modules(model).items()
        if name.endswith(ends) and (kind == "houlsby" or ".attention." not in name)
    }
    if not found:
        raise ConfigError(
            f"method is {kind!r}, and it does not know the blocks of "
            f"{type(model).__name__}; allowed: a BERT, RoBERTa, DeBERTa, DistilBERT or "
            "ALBERT, or another method"
        )
    return found


def find_norms(model: Any) -> dict[str, nn.Parameter]:
    """Find the weights and biases of the blocks' normalisations, by name."""
    return {
        f"{name}.{part}": parameter
        for name, module in block_modules(model).items()
        if isinstance(module, nn.LayerNorm)
        for part, parameter in module.named_parameters()
    }


def _after(
    bottleneck: Bottleneck, module: nn.Module, given: tuple[Tensor], out: Tensor
) -> Tensor:
    return out + bottleneck(out)


def _around(
    bottleneck: Bottleneck, norm: nn.Module, given: tuple[Tensor], out: Tensor
) -> Tensor:
    # The module's own forward: calling it would call this hook again.
    return norm.forward(given[0] + bottleneck(out))
