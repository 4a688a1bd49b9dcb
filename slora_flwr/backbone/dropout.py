"""Dropout on CPUs, from 16 random bits for each entry.

PyTorch draws a number of its generator for each entry, which takes a tenth of a
training step. The bits here are of the same generator, in words of 64: seeds,
checkpointing and forks of it act on them as on PyTorch's own.
"""

from typing import Any

import torch
from torch import Tensor, nn

_STEPS = 2**16  # probabilities are multiples of 1 / _STEPS


def replace_dropout(model: nn.Module) -> None:
    """Have a model's dropout layers draw their entries as told here."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = Dropout


class Dropout(nn.Dropout):
    """PyTorch's layer, with entries drawn as told here if it trains on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the input with entries dropped, if the layer trains."""
        if not self.training or not 0 < self.p < 1 or x.device.type != "cpu":
            return super().forward(x)
        dropped: Tensor = _Dropped.apply(x, self.p)
        return dropped


class _Dropped(torch.autograd.Function):
    """x with dropped entries, of which the backward pass needs one byte each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        kept, ctx.scale = draw_kept(x.shape, p)
        ctx.save_for_backward(kept)
        return (x * kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return (grad_y * kept).mul_(ctx.scale), None


def draw_kept(shape: torch.Size, p: float) -> tuple[Tensor, float]:
    """Draw which entries are kept.

    Parameters
    ----------
    shape : torch.Size
        The entries.
    p : float
        The probability that one is dropped, above 0 and below 1; rounded to a multiple
        of 2^-16 other than 0 and 1.

    Returns
    -------
    kept : Tensor
        uint8 on the CPU, 1 for an entry that is kept and 0 for one that is dropped.
    scale : float
        By which kept entries are multiplied, so that all keep their expectation.
    """
    dropped = min(max(round(p * _STEPS), 1), _STEPS - 1)
    words = torch.empty(-(-shape.numel() // 4), dtype=torch.int64)
    words.random_(-(2**63), None)  # all values of 64 bits
    bits = words.view(torch.int16)[: shape.numel()].view(shape)
    kept = torch.empty(shape, dtype=torch.uint8)
    # Written as bytes at once: a comparison's bool takes three times as long.
    torch.ge(bits, dropped - _STEPS // 2, out=kept)
    return kept, _STEPS / (_STEPS - dropped)
