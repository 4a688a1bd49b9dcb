"""Attention with dropout on CPUs, which keeps little.

PyTorch's fused attention has no dropout on CPUs. Its other one keeps, for the backward
pass, the probabilities of all pairs of tokens before and after dropout, and scaled
copies of queries and keys. This one keeps a byte for each pair, by which the entries
were dropped, and the probabilities only if there are no more of them than entries of
the queries; else it computes them again.
"""

from typing import Any

import torch
from torch import Tensor, nn

from slora_flwr.backbone.dropout import draw_kept

NAME = "slora"
# Of transformers' interface: what changes the scores, and is left to its own function.
_OTHERS = ("position_bias", "s_aux", "softcap")
# What transformers' families call the dropout of probabilities in their configs.
_RATES = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")


def replace_attention(model: Any) -> None:
    """Have a model on a CPU attend as told here, if it attends with dropout."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = model.config
    if config._attn_implementation != "sdpa" or model.device.type != "cpu":
        return
    if any(getattr(config, rate, 0) for rate in _RATES):
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    """Attend, as transformers' `AttentionInterface` has it.

    Parameters
    ----------
    module : nn.Module
        The model's attention.
    query, key, value : Tensor
        Shapes (rows, heads, tokens, features of a head).
    attention_mask : Tensor or None
        True where a query sees a key, (rows, 1, tokens, tokens) or such that it
        broadcasts; None if all see all, or all before them.
    dropout : float
        The probability by which a probability is dropped.
    scaling : float or None
        Of the products of queries and keys; None for 1 / sqrt(features).
    **named
        What else the interface hands over.

    Returns
    -------
    Tensor
        Shape (rows, tokens, heads, features).
    None
        In place of the probabilities.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    is_causal = named.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if (
        not 0 < dropout < 1
        or query.device.type != "cpu"
        or query.shape[1:3] != key.shape[1:3]
        or (attention_mask is not None and attention_mask.dtype != torch.bool)
        or any(named.get(name) is not None for name in _OTHERS)
    ):
        attended: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **named
        )
        return attended
    if attention_mask is None and is_causal:
        size = (query.shape[2], key.shape[2])
        attention_mask = torch.ones(size, dtype=torch.bool).tril()
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Contiguous once, rather than for each of the products.
    heads = (query.contiguous(), key.contiguous(), value.contiguous())
    out: Tensor = _Attention.apply(*heads, attention_mask, dropout, scale)
    return out.transpose(1, 2).contiguous(), None


class _Attention(torch.autograd.Function):
    """dropout(softmax(s·Q Kᵀ)) V, for heads of the shape (tokens, features)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout: float,
        scaling: float,
    ) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            shares = _shares(query, key, mask, scaling)
            kept, ctx.scale = draw_kept(shares.shape, dropout)
            ctx.mask, ctx.scaling = mask, scaling
            if shares.numel() <= query.numel():
                ctx.save_for_backward(query, key, value, kept, shares)
                used = shares * kept
            else:
                ctx.save_for_backward(query, key, value, kept)
                used = shares.mul_(kept)
            return used.mul_(ctx.scale).to(value.dtype) @ value

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, kept, *kept_shares = ctx.saved_tensors
        grad_y = grad_y.contiguous()
        if kept_shares:
            shares = kept_shares[0]
        else:
            shares = _shares(query, key, ctx.mask, ctx.scaling)
        used = (shares * kept).mul_(ctx.scale).to(grad_y.dtype)
        grad_value = used.transpose(-1, -2) @ grad_y
        grad = (grad_y @ value.transpose(-1, -2)).to(shares.dtype)
        grad.mul_(kept).mul_(ctx.scale)
        # Of the softmax: p ∘ (g - Σ g ∘ p).
        grad = torch._softmax_backward_data(grad, shares, -1, shares.dtype)
        grad = grad.mul_(ctx.scaling).to(query.dtype)
        grad_query = grad @ key
        grad_key = grad.transpose(-1, -2) @ query
        return grad_query, grad_key, grad_value, None, None, None


def _shares(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Return softmax(s·Q Kᵀ), (rows, heads, tokens, tokens), float32."""
    scores = (query @ key.transpose(-1, -2)).float().mul_(scaling)
    if mask is not None:
        unseen = torch.finfo(scores.dtype).min
        scores += torch.zeros(mask.shape).masked_fill_(~mask, unseen)
    return scores.softmax(dim=-1)
