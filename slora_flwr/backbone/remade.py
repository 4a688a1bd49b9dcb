"""Activations that are computed again from what is kept anyway.

A normalisation or an activation function keeps its input for the backward pass, and the
linear layer after it keeps its output. A layer that trains in our way keeps the input
alone, which takes no memory of its own, and computes the output again: as the same
operation on the same numbers, bit for bit.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Make = Callable[[Tensor], Tensor]


class Made:
    """Makes an activation again, once for all layers that take it.

    Parameters
    ----------
    make : callable
        Makes it from its source.
    """

    def __init__(self, make: Make) -> None:
        self._make, self._uses = make, 0
        self._held: Tensor | None = None

    def use(self) -> None:
        """Count a layer that will take the activation in its backward pass."""
        self._uses += 1

    def take(self, source: Tensor) -> Tensor:
        """Return the activation, held until the last layer has taken it."""
        self._uses -= 1
        found = self._make(source) if self._held is None else self._held
        self._held = found if self._uses else None
        return found


def mark_outputs(model: nn.Module) -> None:
    """Have outputs of normalisations and activation functions tell their inputs."""
    for module in model.modules():
        if _is_normalisation(module) or _is_activation(module):
            module.register_forward_hook(_mark, with_kwargs=True)


def keep_input(x: Tensor, kept: Tensor) -> tuple[Tensor, Make]:
    """Return what a layer saves in place of its input, and what makes the input of it.

    Parameters
    ----------
    x : Tensor
        The layer's input, as it was given.
    kept : Tensor
        The input as the backward pass needs it: x in the type of the product.

    Returns
    -------
    saved : Tensor
        The source of x if x is marked, and was not changed in place since; else `kept`.
    make : callable
        Makes `kept` from `saved`, once.
    """
    source, made, versions = vars(x).get("remade_from", (x, None, ()))
    if made is None or versions != (x._version, source._version):
        return kept, keep_as_it_is
    made.use()
    dtype = kept.dtype  # and not the tensor, which would be kept
    return source, lambda saved: made.take(saved).to(dtype)


def keep_as_it_is(saved: Tensor) -> Tensor:
    """Make a layer's input of itself."""
    return saved


def _is_normalisation(module: nn.Module) -> bool:
    # Each family has an RMSNorm of its own.
    is_rms = type(module).__name__.endswith("RMSNorm")
    return is_rms or isinstance(module, nn.LayerNorm)


def _is_activation(module: nn.Module) -> bool:
    # transformers' own, such as GELUActivation, and PyTorch's.
    place = type(module).__module__
    # These keep their outputs, not their inputs.
    is_inverse = isinstance(module, nn.ReLU | nn.Tanh | nn.Sigmoid | nn.Softmax)
    known = ("transformers.activations", "torch.nn.modules.activation")
    return place in known and not is_inverse


def _mark(
    module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], y: Tensor
) -> None:
    is_plain = len(given) == 1 and not named
    if not torch.is_grad_enabled() or not is_plain or not y.requires_grad:
        return
    device = y.device.type
    with_autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device)

    def make(x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(device, dtype, enabled=with_autocast):
            again: Tensor = type(module).forward(module, x)
            return again

    versions = (y._version, given[0]._version)
    y.remade_from = (given[0], Made(make), versions)  # type: ignore[attr-defined]
