"""One client's local training, and evaluation."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slora_flwr.adapters.base import Adapter
from slora_flwr.backbone.load import Backbone
from slora_flwr.common.memory import keep_freed
from slora_flwr.common.random import key
from slora_flwr.config import RecipeConfig
from slora_flwr.data.examples import Batch, Examples
from slora_flwr.tasks.base import Evaluation
from slora_flwr.training.precision import precision_of


class DeadlineError(RuntimeError):
    """A client's training or evaluation did not end in time."""


def train(
    backbone: Backbone,
    adapter: Adapter,
    examples: Examples,
    recipe: RecipeConfig,
    rng_key: tuple[object, ...],
    until: float = math.inf,
) -> float:
    """Train an attached adapter from the state it has loaded.

    Parameters
    ----------
    backbone : Backbone
        The resident backbone.
    adapter : Adapter
        The adapter attached to it.
    examples : Examples
        One client's examples.
    recipe : RecipeConfig
        Local training. FedProx (arXiv 1812.06127): `prox` adds mu/2 ‖w - w_sent‖² to
        the loss. `weight_decay` pulls values towards the adapter's anchors, others
        towards 0: decoupled with AdamW (arXiv 1711.05101), in the gradient with SGD.
    rng_key : tuple
        Keys the order of the batches and dropout: (seed, round, client).
    until : float
        Time by the monotonic clock after which no batch is begun.

    Returns
    -------
    float
        Mean loss over the examples, or their learned tokens, of all steps; NaN without
        any.

    Raises
    ------
    DeadlineError
        If batches are left at that time.
    """
    keep_freed()
    stream = np.random.Philox(key=key("train", *rng_key))
    torch.manual_seed(int(stream.random_raw()) >> 1)
    optimizer = LocalOptimizer(adapter, recipe)
    model = backbone.model.train()
    losses: list[Tensor] = []
    read = 0  # examples, or tokens
    batches = -(-len(examples) // recipe.batch_size)
    units = examples.units
    size = max(1, int(units.sum())) / max(1, batches)
    with checkpointing(model, on=recipe.checkpointing):
        batched = (
            rows
            for _ in range(recipe.epochs)
            for rows in examples.shuffled(recipe.batch_size, stream)
        )
        for rows in islice(batched, recipe.steps or None):
            # Over the mean size of batches: all examples, or tokens, weigh the
            # same.
            loss = _add_gradients(backbone, examples, rows, recipe, size, until)
            optimizer.step()
            losses.append(loss)
            read += int(units[rows].sum())
    # One transfer from the device at the end instead of one per step. Bounded steps may
    # have read more or fewer tokens than the mean.
    whole = float(torch.stack(losses).mean()) if losses else float("nan")
    return whole * (size * len(losses) / max(1, read))


def _add_gradients(
    backbone: Backbone,
    examples: Examples,
    rows: NDArray[np.int64],
    recipe: RecipeConfig,
    size: float,
    until: float,
) -> Tensor:
    """Add the gradients of a step's loss over `size` to the parameters; return it."""
    losses = []
    for part in examples.parts(rows, recipe.accumulate, recipe.tokens):
        if time.monotonic() >= until:
            raise DeadlineError("the round's deadline passed as it trained")
        batch = examples.batch(part).to(backbone.device)
        with precision_of(backbone, recipe.precision):
            loss = backbone.task.loss(backbone.model, batch)
        loss = loss / size
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


@contextmanager
def checkpointing(model: Any, *, on: bool) -> Iterator[None]:
    """Have the blocks keep only what goes into them, for the while of a training."""
    if not on:
        yield
        return
    # Newer versions of transformers warn of the older name.
    name = (
        "activation"
        if hasattr(model, "activation_checkpointing_enable")
        else "gradient"
    )
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:  # PEFT would prepare the model for it.
        getattr(model, f"{name}_checkpointing_disable")()


def evaluate(
    backbone: Backbone,
    examples: Examples,
    precision: str = "float32",
    batch_size: int = 64,
    tokens: int = 0,
    until: float = math.inf,
) -> Evaluation:
    """Evaluate the backbone as it is now, attached adapter included.

    Parameters
    ----------
    backbone, examples
        As for `train`.
    precision : str
        `train.precision`.
    batch_size, tokens : int
        The most texts, and tokens with padding, of a batch; 0 tokens for no limit.
    until : float
        Time by the monotonic clock after which no batch is begun.

    Raises
    ------
    DeadlineError
        If batches are left at that time.
    """
    model = backbone.model.eval()

    def batches() -> Iterator[Batch]:
        for rows in examples.in_order_of_length(batch_size, tokens):
            if time.monotonic() >= until:
                raise DeadlineError("the round's deadline passed as it evaluated")
            yield examples.batch(rows).to(backbone.device)

    with torch.inference_mode(), precision_of(backbone, precision):
        return backbone.task.evaluate(model, batches())


class LocalOptimizer:
    """The steps of a client's training, from its parameters' gradients.

    Parameters
    ----------
    adapter, recipe
        As for `train`.
    """

    def __init__(self, adapter: Adapter, recipe: RecipeConfig) -> None:
        self.parameters = adapter.parameters()
        self._adapter, self._recipe = adapter, recipe
        head = [*adapter.backbone.head.values()]
        rates = dict.fromkeys(map(id, head), head_rate(recipe))
        self._anchored = [
            (parameter, anchor, rates.get(id(parameter), recipe.lr))
            for parameter, anchor in (_anchored(adapter) if recipe.weight_decay else [])
        ]
        anchored = [parameter for parameter, _, _ in self._anchored]
        self._optimizer = make_optimizer(self.parameters, recipe, anchored, head)
        kept = self.parameters if recipe.prox else []
        self._sent = [parameter.detach().clone() for parameter in kept]

    def step(self) -> None:
        """Take a step along the gradients, and clear them."""
        recipe = self._recipe
        for parameter, origin in zip(self.parameters, self._sent, strict=False):
            if parameter.grad is not None:  # None if the loss does not use it
                parameter.grad.add_(parameter.detach() - origin, alpha=recipe.prox)
        if recipe.clip_norm:
            nn.utils.clip_grad_norm_(self.parameters, recipe.clip_norm)
        _decay(self._anchored, recipe)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._adapter.commit()


def make_optimizer(
    parameters: list[nn.Parameter],
    recipe: RecipeConfig,
    anchored: Sequence[nn.Parameter] = (),
    head: Sequence[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """Return the local optimiser of the parameters that an adapter trains.

    Parameters
    ----------
    parameters : list[nn.Parameter]
        The parameters.
    recipe : RecipeConfig
        Local training.
    anchored : Sequence[nn.Parameter]
        Those that do not decay towards 0.
    head : Sequence[nn.Parameter]
        Those of the head, which may have a rate of its own.
    """
    kept, heads = {id(p) for p in anchored}, {id(p) for p in head}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {(False, False): []}
    for p in parameters:
        groups.setdefault((id(p) in kept, id(p) in heads), []).append(p)
    grouped = [
        {
            "params": members,
            "lr": head_rate(recipe) if is_head else recipe.lr,
            "weight_decay": 0.0 if is_anchored else recipe.weight_decay,
        }
        for (is_anchored, is_head), members in groups.items()
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(grouped, lr=recipe.lr, momentum=recipe.momentum)
    # Fused: one pass over each parameter, where the default makes several.
    return torch.optim.AdamW(grouped, lr=recipe.lr, fused=True)


def head_rate(recipe: RecipeConfig) -> float:
    """Return the learning rate of the head."""
    return recipe.head_lr or recipe.lr


def _anchored(adapter: Adapter) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the parameters that decay towards an anchor, each with its anchor."""
    anchors = adapter.anchors()
    named = zip(adapter.returned(), adapter.parameters(), strict=True)
    return [(p, anchors[name].to(p)) for name, p in named if name in anchors]


@torch.no_grad()
def _decay(
    anchored: Sequence[tuple[nn.Parameter, Tensor, float]], recipe: RecipeConfig
) -> None:
    """Pull parameters towards their anchors, as torch's optimisers do towards 0.

    Each comes with its anchor and its learning rate.
    """
    for parameter, anchor, rate in anchored:
        if parameter.grad is None:  # the loss does not use it
            continue
        if recipe.optimizer == "sgd":
            parameter.grad.add_(parameter - anchor, alpha=recipe.weight_decay)
        else:
            parameter.lerp_(anchor, rate * recipe.weight_decay)
