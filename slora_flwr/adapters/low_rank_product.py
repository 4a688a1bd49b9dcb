"""The product of a layer with low-rank factors, as one step of autograd.

PEFT's layer computes W x, A x, B (A x), its scaled copy and the sum one after the
other, and autograd the reverse. Here the scaled product is added in place both ways,
and products with the narrow side last, which are slow on CPUs, are computed the other
way round. Evaluations, which the export must repeat, compute as PEFT's layer does.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from slora_flwr.backbone.remade import keep_input


def join_products(layer: nn.Module, *frozen: Tensor) -> None:
    """Have a layer of PEFT's LoRA train with both of its products in one step.

    The product with a packed weight stays its own. A layer whose factors have hooks
    trains as PEFT's.

    Parameters
    ----------
    layer : nn.Module
        A `peft.tuners.lora.Linear` with the adapter `default` and no dropout.
    *frozen : Tensor
        Rows and columns that A and B compute with beside their own, if there are any.
    """
    layer.forward = partial(_forward, layer, frozen)


def _forward(layer: Any, frozen: tuple[Tensor, ...], x: Tensor) -> Tensor:
    base, a, b = layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]
    y: Tensor
    if not torch.is_grad_enabled() or _is_watched(a) or _is_watched(b):
        y = type(layer).forward(layer, x)
        return y
    factors = [a.weight, b.weight]
    if frozen:
        pairs = zip(factors, frozen, strict=True)
        factors = [torch.cat(pair, dim) for dim, pair in enumerate(pairs)]
    scaling = layer.scaling["default"]
    if type(base) is nn.Linear:
        y = _LowRankProduct.apply(x, base.weight, base.bias, *factors, scaling)
    else:
        y = base(x)
        y = y + _LowRankProduct.apply(x, None, None, *factors, scaling).to(y.dtype)
    return y


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class _LowRankProduct(torch.autograd.Function):
    """y = x Wᵀ + bias + s·(x Aᵀ) Bᵀ, with gradients for x, A and B.

    Without W, it is the last term alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        device = x.device.type
        dtype = a.dtype if weight is None else weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        given = x
        with torch.autocast(device, enabled=False):
            x, a, b = x.to(dtype), a.to(dtype), b.to(dtype)
            rows = x.flatten(0, -2)
            inner = rows @ a.T
            if weight is None:
                y = inner @ b.T * scaling
            elif bias is None:
                y = rows @ weight.to(dtype).T
                y.addmm_(inner, b.T, alpha=scaling)
            else:  # As one more rank, it needs no pass over y of its own.
                y = rows @ weight.to(dtype).T
                ones = inner.new_ones(len(inner), 1)
                wide = torch.cat([b, bias[:, None].to(dtype)], dim=1)
                y.addmm_(torch.cat([inner * scaling, ones], dim=1), wide.T)
        saved: Tensor | None = None
        if ctx.needs_input_grad[3]:  # unless A is frozen
            saved, ctx.make = keep_input(given, x)
        ctx.save_for_backward(saved, inner, a, b)
        ctx.weight, ctx.scaling = weight, scaling
        # No view, since some models change a layer's output in place.
        shaped: Tensor = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])
        return shaped

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        saved, inner, a, b = ctx.saved_tensors
        rows = grad_y.flatten(0, -2)
        # g B, (rows, rank), by its transposed factor.
        grad_inner = F.linear(rows, b.T.contiguous())
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            if ctx.weight is None:
                grad_x = grad_inner @ a * ctx.scaling
            else:
                grad_x = rows @ ctx.weight.to(rows.dtype)
                grad_x.addmm_(grad_inner, a, alpha=ctx.scaling)
            grad_x = grad_x.view(*grad_y.shape[:-1], -1)
        if ctx.needs_input_grad[3]:
            x = ctx.make(saved).flatten(0, -2)
            grad_a = (grad_inner.T @ x).mul_(ctx.scaling)
        if ctx.needs_input_grad[4]:
            grad_b = (inner.T @ rows).mul_(ctx.scaling).T
        return grad_x, None, None, grad_a, grad_b, None
