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


class Made:
    """Makes an activation again, once for all layers that take it.

    Parameters
    ----------
    make : callable
        Makes it from its source.
    """

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
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


def source_of(x: Tensor) -> tuple[Tensor, Made | None]:
    """Return what to keep in place of a layer's input, and how the input is made of it.

    Returns
    -------
    source : Tensor
        The input of what made x, or x itself.
    made : Made or None
        Makes x from the source; None if it is x.
    """
    source, made, versions = vars(x).get("remade_from", (x, None, ()))
    if made is not None and versions != (x._version, source._version):
        return x, None  # changed in place meanwhile
    return source, made


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
