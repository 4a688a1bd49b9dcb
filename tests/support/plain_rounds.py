"""Federated rounds in plain PyTorch: stock models, dense masks, W + s·B·A."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812
from transformers.pytorch_utils import Conv1D

from slora_flwr.adapters.masks import make_mask
from slora_flwr.config import RunConfig
from slora_flwr.data.examples import Examples
from slora_flwr.training.trainer import Trainer

Tensors = Mapping[str, Tensor]


class PlainRounds:
    """A run of one round a phase, in which each step has all of a client's examples.

    Clients train with SGD. From the trainer it takes the examples and the random start
    of the head and of A, which the phase's first state has.

    Attributes
    ----------
    first : float
        The test loss before training.
    """

    def __init__(self, config: RunConfig, trainer: Trainer, start: Tensors) -> None:
        self._config, self._start, self._trainer = config, start, trainer
        task = trainer.task
        sizes: dict[str, Any] = {}
        if task.has_classes:
            sizes = {"num_labels": len(trainer.data.classes)}
        auto = getattr(transformers, task.auto_class)
        self._model = auto.from_pretrained(config.model.name, **sizes).eval()
        self._model.config.pad_token_id = trainer.data.tokenizer.pad_token_id
        named = dict(self._model.named_parameters())
        self._head = {name: start[name] for name in trainer.model.backbone.head}
        self._all = {name: p.detach() for name, p in named.items()} | self._head
        modules = dict(self._model.named_modules())
        self._transposed = {n for n, m in modules.items() if isinstance(m, Conv1D)}
        ends = tuple(config.lora.targets.split(","))
        self._weights = {
            name: self._turn(name, module.weight.detach())
            for name, module in modules.items()
            if isinstance(module, torch.nn.Linear | Conv1D)
            and any(part.isdecimal() for part in name.split("."))
            and (ends == ("all-linear",) or name.endswith(ends))
        }
        self.first = self.test_loss({})

    def run(self) -> float:
        """Return the test loss after the rounds of the run's method."""
        config, method = self._config, self._config.method
        if method in ("fft", "bitfit", "head"):
            trained = {
                "fft": self._all,
                "bitfit": {
                    n: t
                    for n, t in self._all.items()
                    if n.endswith(".bias") or n in self._head
                },
                "head": self._head,
            }[method]
            return self.test_loss(self._mean(self._round(trained, dict)))
        if method == "head-lora":
            self._head = self._mean(self._round(self._head, dict))
        moved: Tensors = {name: torch.zeros(()) for name in self._weights}
        rank, scaling = config.lora.rank, config.lora.alpha / config.lora.rank
        a = {n: self._start.get(f"{n}.lora_A", torch.zeros(())) for n in moved}
        b = {n: torch.zeros(len(w), rank) for n, w in self._weights.items()}
        given_up = moved
        if method in ("sft", "slora"):
            masks = {n: self._mask(n, w) for n, w in self._weights.items()}
            zeros = {n: torch.zeros_like(w) for n, w in self._weights.items()}
            added = self._mean(
                self._round(
                    zeros | self._head,
                    lambda v: self._changed({n: masks[n] * v[n] for n in masks}, v),
                )
            )
            self._head = {name: added[name] for name in self._head}
            moved = {name: masks[name] * added[name] for name in masks}
            if method == "sft":
                return self.test_loss(self._changed(moved, {}))
            for name, delta in moved.items():
                a[name], b[name] = _factors(delta / scaling, rank)
            given_up = {name: scaling * b[name] @ a[name] for name in moved}

        def low_rank(v: Tensors) -> Tensors:
            factors = fixed | dict(v)
            product = {n: factors[f"{n}.B"] @ factors[f"{n}.A"] for n in moved}
            total = {n: moved[n] - given_up[n] + scaling * product[n] for n in moved}
            return self._changed(total, v)

        fixed = {f"{n}.A": t for n, t in a.items()} | {f"{n}.B": b[n] for n in b}
        only_b = method in ("ffa-lora", "alternate-lora")
        trained = {n: t for n, t in fixed.items() if n.endswith(".B") or not only_b}
        made = self._round(trained | self._head, low_rank)
        mean = self._mean(made)
        if method not in ("fedex-lora", "flexlora"):
            return self.test_loss(low_rank(mean))
        products = self._mean(
            [
                (n, {m: scaling * v[f"{m}.B"] @ v[f"{m}.A"] for m in moved})
                for n, v in made
            ]
        )
        if method == "flexlora":
            for name, product in products.items():
                kept_a, kept_b = _factors(product, rank)
                products[name] = kept_b @ kept_a
        return self.test_loss(self._changed(products, mean))

    def test_loss(self, parameters: Tensors) -> float:
        """Return the mean loss on the test data."""
        with torch.no_grad():
            return float(self._loss(parameters, self._trainer.data.tokenised.test))

    def _round(
        self, start: Tensors, make: Callable[[Tensors], Tensors]
    ) -> list[tuple[int, dict[str, Tensor]]]:
        """Return each client's number of examples and what it trained."""
        recipe, made = self._config.train, []
        for client in range(self._config.clients.count):
            examples, _ = self._trainer.data.examples(client)
            values = {n: t.clone().requires_grad_() for n, t in start.items()}
            for _ in range(recipe.epochs):
                loss = self._loss(make(values), examples)
                named = list(values.values())
                grads = torch.autograd.grad(loss, named, allow_unused=True)
                with torch.no_grad():
                    for value, grad in zip(named, grads, strict=True):
                        if grad is not None:
                            value -= recipe.lr * grad
            made.append((len(examples), {n: t.detach() for n, t in values.items()}))
        return made

    @staticmethod
    def _mean(made: list[tuple[int, dict[str, Tensor]]]) -> dict[str, Tensor]:
        total = sum(count for count, _ in made)
        return {
            name: sum((n / total * v[name] for n, v in made), torch.zeros(()))
            for name in made[0][1]
        }

    def _changed(self, changes: Tensors, values: Tensors) -> Tensors:
        """Return the model's weights with changes added, and its head."""
        weights = {
            f"{name}.weight": self._turn(name, self._weights[name] + change)
            for name, change in changes.items()
        }
        return weights | self._head | {n: values[n] for n in self._head if n in values}

    def _loss(self, parameters: Tensors, examples: Examples) -> Tensor:
        ids, mask, labels = examples.batch(np.arange(len(examples)))
        given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        parameters = self._head | dict(parameters)
        logits = functional_call(self._model, parameters, (), given).logits
        if labels.ndim == 1:
            return F.cross_entropy(logits, labels)
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])

    def _mask(self, name: str, weight: Tensor) -> Tensor:
        config, mask = self._config, torch.zeros(weight.numel())
        shape = (weight.shape[0], weight.shape[1])
        sparse = config.sparse
        mask[make_mask(config.seed, name, shape, sparse.density, sparse.mask)] = 1
        return mask.view(shape)

    def _turn(self, name: str, weight: Tensor) -> Tensor:
        return weight.T if name in self._transposed else weight


def _factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B, whose product is the best of a rank."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    roots = s[:rank].sqrt()
    return (roots[:, None] * vt[:rank]).float(), (u[:, :rank] * roots).float()
