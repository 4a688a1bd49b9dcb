"""Activations that are computed again, against those that are kept."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from slora_flwr.adapters import Adapter, LowRankAdapter, SparseAdapter
from slora_flwr.backbone import remade
from slora_flwr.backbone.load import Backbone
from tests.support.tiny import load_tiny, make_examples

ADAPTERS = {
    "sparse": lambda: SparseAdapter(0.2, "unstructured", 5),
    "columns": lambda: SparseAdapter(0.2, "columns", 5),
    "lora": lambda: LowRankAdapter(4, 8),
}


def step(backbone: Backbone, adapter: Adapter, bf16: bool) -> tuple[int, list[Tensor]]:
    """Return the bytes that a step keeps, and its gradients."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = make_examples().batch(torch.arange(8).numpy())
    torch.manual_seed(1)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        loss = backbone.task.loss(backbone.model.train(), batch)
    loss.backward()
    found = [p.grad.clone() for p in adapter.parameters() if p.grad is not None]
    return sum(kept.values()), found


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_gradients_are_the_same_bits(
    family: str,
    kind: str,
    bf16: bool,
    tiny_models: dict[str, Path],
) -> None:
    found = []
    for is_marked in (True, False):
        backbone = load_tiny(tiny_models[family])
        if not is_marked:
            for module in backbone.model.modules():
                module._forward_hooks.clear()
        adapter = ADAPTERS[kind]()
        adapter.attach(backbone)
        if kind == "lora":
            state = adapter.state()
            adapter.load({n: t + 0.1 for n, t in state.items()})
        found.append(step(backbone, adapter, bf16))
    (size, gradients), (whole, others) = found
    assert len(gradients) == len(others) > 0
    for one, other in zip(gradients, others, strict=True):
        assert torch.equal(one, other)
    assert size < whole or kind == "columns"


def test_an_activation_that_was_changed_in_place_is_kept() -> None:
    norm, layer = torch.nn.LayerNorm(4), torch.nn.Linear(4, 3)
    remade.mark_outputs(norm)
    x = torch.randn(2, 4, requires_grad=True)
    y = norm(x)
    saved, make = remade.keep_input(y, y)
    assert saved is x
    assert torch.equal(make(saved), y)
    y *= 2
    saved, make = remade.keep_input(y, y)
    assert saved is y
    assert make(saved) is y
    assert torch.equal(layer(y), layer(2 * norm(x)))
