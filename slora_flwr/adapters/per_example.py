"""The gradient of each example, from what goes into a layer and comes back to it.

A layer's gradient is a sum over the rows of a batch. From its input x and the gradient
g of its output follows each row's share, as in Opacus (arXiv 2109.12298).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

# From a layer's input and the gradient of its output, both with a row for each example,
# to the gradients of a parameter, shape (rows, *parameter).
Rule = Callable[[Tensor, Tensor], Tensor]


class Use(NamedTuple):
    """A layer that computes with a trained parameter."""

    parameter: Tensor
    module: nn.Module
    rule: Rule


def find_uses(
    modules: Iterable[nn.Module], trained: Iterable[nn.Parameter]
) -> list[Use]:
    """Return the uses of trained parameters by layers of the kinds known here."""
    wanted = {id(parameter) for parameter in trained}
    return [
        Use(parameter, module, rule)
        for module in modules
        for parameter, rule in _rules(module)
        if id(parameter) in wanted
    ]


def _rules(module: nn.Module) -> Iterator[tuple[Tensor, Rule]]:
    """Yield a layer's own parameters with their rules, if its kind is known."""
    if isinstance(module, nn.Linear):
        size = module.weight.shape
        yield module.weight, lambda x, g: _of_product(x, g, size)
    elif isinstance(module, nn.Embedding):
        if module.max_norm is None and not module.scale_grad_by_freq:
            yield module.weight, lambda x, g: _of_table(module, x, g)
    elif isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        if module.elementwise_affine:
            yield module.weight, lambda x, g: _over_tokens(_normed(module, x) * g)
    elif type(module).__name__.endswith("RMSNorm"):
        if isinstance(weight := getattr(module, "weight", None), Tensor):
            yield weight, lambda x, g: _over_tokens(_rms_normed(module, x) * g)
    else:
        return
    if isinstance(bias := getattr(module, "bias", None), Tensor):
        yield bias, lambda x, g: _over_tokens(g)


def _of_product(x: Tensor, g: Tensor, size: torch.Size) -> Tensor:
    """Return gᵀ x of each row. A layer may compute with more than what it trains."""
    x, g = x[..., : size[1]], g[..., : size[0]]
    x, g = x.reshape(len(x), -1, size[1]), g.reshape(len(g), -1, size[0])
    return g.transpose(1, 2) @ x


def _over_tokens(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1, values.shape[-1]).sum(dim=1)


def _normed(module: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, module.normalized_shape, eps=module.eps)


def _rms_normed(module: nn.Module, x: Tensor) -> Tensor:
    eps = float(getattr(module, "variance_epsilon", getattr(module, "eps", None) or 0))
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def _of_table(module: nn.Embedding, ids: Tensor, g: Tensor) -> Tensor:
    found = g.new_zeros(len(g), *module.weight.shape)
    rows = torch.arange(len(g), device=g.device)[:, None].expand_as(ids)
    found.index_put_((rows, ids), g, accumulate=True)
    if module.padding_idx is not None:
        found[:, module.padding_idx] = 0
    return found
