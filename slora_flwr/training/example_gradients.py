"""The gradients of a batch's examples, each by itself."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slora_flwr.adapters.base import Adapter
from slora_flwr.adapters.per_example import Rule
from slora_flwr.backbone.load import Backbone
from slora_flwr.data.examples import Batch, Examples
from slora_flwr.training.precision import precision_of

# Of a gradient's norm, by which two ways to compute it may differ; and in bf16.
_TOLERANCE, _ROUGH = 1e-3, 0.02


class ExampleGradients:
    """Compute the gradients of an attached adapter's parameters for each example.

    One backward pass gives them all, by hooks on the layers that the adapter names.
    Where these do not give what a backward pass for each example does, as tried on a
    batch that is nobody's data, there is one for each.

    Parameters
    ----------
    backbone : Backbone
        The resident backbone.
    adapter : Adapter
        The adapter attached to it.
    precision : str
        `train.precision`.

    Attributes
    ----------
    together : bool
        Whether one backward pass gives all.

    Raises
    ------
    ValueError
        If the model has a batch normalisation: no example's gradient is its own then.
    """

    def __init__(self, backbone: Backbone, adapter: Adapter, precision: str) -> None:
        for name, module in backbone.model.named_modules():
            if isinstance(module, _BatchNorm):
                raise ValueError(
                    f"layer {name} is {type(module).__name__}; allowed: none that "
                    "mixes the examples of a batch"
                )
        self._backbone, self._precision = backbone, precision
        self._parameters = adapter.parameters()
        self._places = {id(p): i for i, p in enumerate(self._parameters)}
        self._uses = adapter.uses()
        self._found: list[Tensor | None] = []
        self._size = 0
        self.together = True
        self.together = self._agrees()

    def of(self, batch: Batch) -> list[Tensor]:
        """Return the gradients of the examples' losses, (rows, *parameter), float32.

        Parameters
        ----------
        batch : Batch
            Examples, on any device.
        """
        batch = batch.to(self._backbone.device)
        if self.together:
            return self._together(batch)
        rows = [Batch(*(t[i : i + 1] for t in batch)) for i in range(len(batch.ids))]
        return [
            torch.stack(parts) for parts in zip(*map(self._alone, rows), strict=True)
        ]

    def _alone(self, row: Batch) -> list[Tensor]:
        self._backward(row)
        return [
            torch.zeros_like(p) if g is None else g.float()
            for p, g in zip(self._parameters, self._taken(), strict=True)
        ]

    def _together(self, batch: Batch) -> list[Tensor]:
        self._size = len(batch.ids)
        self._found = [None] * len(self._parameters)
        with self._hooked():
            self._backward(batch)
        self._taken()
        found, self._found = self._found, []
        return [
            p.new_zeros(self._size, *p.shape, dtype=torch.float32) if g is None else g
            for p, g in zip(self._parameters, found, strict=True)
        ]

    def _backward(self, batch: Batch) -> None:
        backbone = self._backbone
        with precision_of(backbone, self._precision):
            loss = backbone.task.loss(backbone.model, batch)
        loss.backward()

    def _taken(self) -> list[Tensor | None]:
        """Return the parameters' gradients, and clear them."""
        found = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        return found

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        hooks = []
        for parameter, module, rule in self._uses:
            if isinstance(module, nn.Embedding):
                hooks.append(module.register_forward_pre_hook(self._widen))
            hook = partial(self._watch, self._places[id(parameter)], rule)
            hooks.append(module.register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def _widen(self, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """Give each example positions of its own, where one row is for all."""
        if not given or len(given[0]) != 1:
            return given
        ids, *others = given
        return (ids.expand(self._size, *ids.shape[1:]), *others)

    def _watch(
        self, place: int, rule: Rule, _: nn.Module, given: tuple[Tensor], y: Tensor
    ) -> None:
        if not (given and isinstance(y, Tensor) and y.requires_grad):
            return
        x = given[0].detach()
        y.register_hook(lambda grad_y: self._record(place, rule, x, grad_y))

    def _record(self, place: int, rule: Rule, x: Tensor, grad_y: Tensor) -> None:
        if len(x) != self._size or len(grad_y) != self._size:
            raise _MixedRowsError("a layer's rows are not the examples")
        x = x.float() if x.is_floating_point() else x
        found = rule(x, grad_y.float())
        if found.shape[1:] != self._parameters[place].shape:
            raise _MixedRowsError("a layer computes with another shape")
        before = self._found[place]
        self._found[place] = found if before is None else before + found

    def _agrees(self) -> bool:
        """Return whether one backward pass gives what one for each example does."""
        model, batch = self._backbone.model, self._tried()
        was_training = model.training
        model.eval()  # without dropout
        try:
            found = self._together(batch)
            self.together = False
            expected = self.of(batch)
        except _MixedRowsError:
            self._taken()
            return False
        finally:
            self.together = True
            model.train(was_training)
        apart = row_norms([a - b for a, b in zip(found, expected, strict=True)])
        is_rough = self._precision == "bf16" or self._backbone.dtype == torch.bfloat16
        within = _ROUGH if is_rough else _TOLERANCE
        return bool((apart <= within * row_norms(expected)).all())

    def _tried(self) -> Batch:
        """Return three examples of different lengths that are nobody's data."""
        backbone = self._backbone
        vocabulary = int(backbone.model.get_input_embeddings().num_embeddings)
        pad = int(backbone.tokenizer.pad_token_id)
        lengths = np.array([4, 7, 5])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        stream = np.random.Philox(key=0)
        tokens = stream.random_raw(int(offsets[-1])) % np.uint64(vocabulary)
        tokens = np.where(tokens == pad, (pad + 1) % vocabulary, tokens)
        learned = None
        if not backbone.task.has_classes:
            learned = np.ones(len(tokens), dtype=bool)
            learned[offsets[:-1]] = False
            learned[1] = False
        labels = np.array([0, 1, 0])
        tried = Examples(tokens.astype(np.int32), offsets, labels, pad, learned)
        return tried.batch(np.arange(3)).to(backbone.device)


def row_norms(gradients: Sequence[Tensor]) -> Tensor:
    """Return each example's norm over all parameters, (rows,), float64."""
    squares = [g.flatten(1).double().square_().sum(dim=1) for g in gradients]
    return torch.stack(squares).sum(dim=0).sqrt_()


class _MixedRowsError(RuntimeError):
    """A layer's rows are not the batch's examples."""
