"""Gradients of each example: those of a backward pass for each, for every adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slora_flwr.adapters import (
    Adapter,
    BiasAdapter,
    FullAdapter,
    HeadAdapter,
    HoulsbyAdapter,
    LowRankAdapter,
    PfeifferAdapter,
    SparseAdapter,
)
from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.backbone.load import Backbone
from slora_flwr.config import parse
from slora_flwr.config.schedule import make_schedule
from slora_flwr.data.examples import Examples
from slora_flwr.training.attached_model import AttachedModel
from slora_flwr.training.example_gradients import ExampleGradients
from slora_flwr.training.loop import checkpointing as checkpointed
from slora_flwr.training.process_data import ProcessData
from tests.support.runs import Config
from tests.support.tiny import load_tiny, make_examples, no_dropout, perturb

ADAPTERS: dict[str, Callable[[], Adapter]] = {
    "unstructured": lambda: SparseAdapter(0.1, "unstructured", 5),
    "dense mask": lambda: SparseAdapter(0.5, "unstructured", 5),
    "rows": lambda: SparseAdapter(0.1, "rows", 5),
    "columns": lambda: SparseAdapter(0.1, "columns", 5),
    "redrawn": lambda: SparseAdapter(0.1, "unstructured", 5, redrawn=True),
    "lora": lambda: LowRankAdapter(4, 12.0),
    "ffa": lambda: LowRankAdapter(4, 12.0, trains="b"),
    "alternate": lambda: LowRankAdapter(4, 12.0, trains="in-turn"),
    "houlsby": lambda: HoulsbyAdapter(4),
    "pfeiffer": lambda: PfeifferAdapter(4),
    "bitfit": BiasAdapter,
    "full": FullAdapter,
    "head": HeadAdapter,
}


def attached(backbone: Backbone, name: str) -> Adapter:
    """Attach an adapter, with values at which none of its gradients is zero."""
    adapter = ADAPTERS[name]()
    adapter.attach(backbone, BaseWeights() if name == "redrawn" else None)
    adapter.begin(1)
    adapter.load(perturb(adapter.state(), 0.05))
    return adapter


def one_by_one(
    backbone: Backbone, adapter: Adapter, examples: Examples
) -> list[list[Tensor]]:
    """By autograd alone, without padding; a list for each example."""
    found = []
    for row in range(len(examples)):
        batch = examples.batch(np.array([row]))
        loss = backbone.task.loss(backbone.model, batch)
        parameters = adapter.parameters()
        given = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append(
            [
                torch.zeros_like(p) if g is None else g
                for p, g in zip(parameters, given, strict=True)
            ]
        )
    return found


def assert_equal(
    backbone: Backbone, adapter: Adapter, examples: Examples, *, together: bool = True
) -> None:
    backbone.model.train()
    gradients = ExampleGradients(backbone, adapter, "float32")
    assert gradients.together == together
    assert backbone.model.training
    found = gradients.of(examples.batch(np.arange(len(examples))))
    for row, expected in enumerate(one_by_one(backbone, adapter, examples)):
        scale = torch.stack([g.norm() for g in expected]).norm()
        for mine, right in zip(found, expected, strict=True):
            assert mine.shape[1:] == right.shape
            assert float((mine[row] - right).norm()) <= 2e-5 * scale
    assert all(parameter.grad is None for parameter in adapter.parameters())


@pytest.mark.parametrize("name", ADAPTERS)
def test_gradients_of_every_adapter(tiny_models: dict[str, Path], name: str) -> None:
    backbone = no_dropout(load_tiny(tiny_models["bert"]))
    adapter = attached(backbone, name)
    assert_equal(backbone, adapter, make_examples(7))
    assert_equal(backbone, adapter, make_examples(1, seed=3))


@pytest.mark.parametrize("name", ["unstructured", "lora", "bitfit", "full"])
def test_gradients_in_every_family(
    tiny_models: dict[str, Path], family: str, name: str
) -> None:
    """ALBERT computes with the same layers again and again.

    DeBERTa puts relative positions, the same for all examples, through target matrices
    too, so one by one it is.
    """
    backbone = no_dropout(load_tiny(tiny_models[family]))
    is_known = family != "deberta-v2"
    adapter = attached(backbone, name)
    assert_equal(backbone, adapter, make_examples(5), together=is_known)


@pytest.mark.parametrize("method", ["lora", "sft", "fft"])
def test_gradients_of_a_language_model(causal: Config, method: str) -> None:
    """Its head, which fft trains, is computed of tokens without their examples."""
    config = parse(causal | {"method": method})
    data = ProcessData(config)
    model = AttachedModel(config, data)
    adapter = model.attach(make_schedule(config)[0])
    adapter.begin(1)
    adapter.load(perturb(adapter.state(), 0.02))
    no_dropout(model.backbone)
    examples = data.tokenised.train.select(np.arange(4))
    assert_equal(model.backbone, adapter, examples, together=method != "fft")
    model.detach()


class Mixing(nn.Module):
    """A layer that computes with its weight by its own means."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


def test_a_layer_of_unknown_kind_takes_a_pass_for_each(
    tiny_models: dict[str, Path],
) -> None:
    backbone = no_dropout(load_tiny(tiny_models["bert"]))
    model: Any = backbone.model
    model.classifier = Mixing(model.classifier)
    assert_equal(backbone, attached(backbone, "head"), make_examples(4), together=False)


def test_dropout_is_drawn_for_each_example(tiny_models: dict[str, Path]) -> None:
    """Two equal examples of a batch have different gradients."""
    backbone = load_tiny(tiny_models["bert"])
    adapter = attached(backbone, "lora")
    examples = make_examples(3).select(np.array([1, 1]))
    backbone.model.train()
    torch.manual_seed(0)
    gradients = ExampleGradients(backbone, adapter, "float32")
    assert gradients.together
    found = gradients.of(examples.batch(np.arange(2)))
    assert any(not torch.allclose(g[0], g[1]) for g in found)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_and_bf16(
    tiny_models: dict[str, Path], checkpointing: bool
) -> None:
    backbone = no_dropout(load_tiny(tiny_models["bert"]))
    adapter = attached(backbone, "unstructured")
    examples = make_examples(4)
    with checkpointed(backbone.model.train(), on=checkpointing):
        assert_equal(backbone, adapter, examples)
        rough = ExampleGradients(backbone, adapter, "bf16")
        assert rough.together
        found = rough.of(examples.batch(np.arange(4)))
    exact = one_by_one(backbone, adapter, examples)
    for row in range(4):
        apart = torch.stack(
            [(g[row] - e).norm() for g, e in zip(found, exact[row], strict=True)]
        )
        assert apart.norm() < 0.1 * torch.stack([e.norm() for e in exact[row]]).norm()
