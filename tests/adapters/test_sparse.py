"""The sparse adapter: sizes, gradients, and what it never moves."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForSequenceClassification

from slora_flwr.adapters import FullAdapter, SparseAdapter
from slora_flwr.adapters.masks import make_mask
from slora_flwr.backbone.load import Backbone
from slora_flwr.config import RecipeConfig, parse
from slora_flwr.config.methods import find_adapter
from slora_flwr.data.examples import Examples
from slora_flwr.training.loop import train
from tests.support.tiny import copy_parameters, load_tiny, loss_of, shape_of

DENSITY = 0.2


ADAMW = RecipeConfig(epochs=2, batch_size=8, lr=0.01, weight_decay=0.1)
KEY = (0, 1, 2)


@pytest.mark.parametrize("budget", ["uniform", "equal", "erdos-renyi"])
def test_size_of_a_dealt_density(backbone: Backbone, budget: str) -> None:
    config = parse({"sparse.density": 0.1, "sparse.budget": budget})
    adapter = find_adapter("sparse").from_config(config)
    adapter.attach(backbone)
    trained = sum(p.numel() for p in adapter.parameters())
    assert find_adapter("sparse").state_size(config, backbone) == trained
    whole = sum(module.weight.numel() for module in backbone.targets.values())
    head = sum(p.numel() for p in backbone.head.values())
    assert trained - head == pytest.approx(0.1 * whole, abs=len(backbone.targets))


@pytest.mark.parametrize("structure", ["unstructured", "rows", "columns"])
def test_masked_out_weights_never_move(
    backbone: Backbone, examples: Examples, structure: str
) -> None:
    before = {n: m.weight.detach().clone() for n, m in backbone.targets.items()}
    adapter = SparseAdapter(DENSITY, structure, 5)
    adapter.attach(backbone)
    train(backbone, adapter, examples, ADAMW, KEY)
    for name, module in backbone.targets.items():
        out, into = before[name].shape
        mask = np.zeros(out * into, dtype=bool)
        mask[make_mask(5, name, (out, into), DENSITY, structure)] = True
        moved = (module.weight != before[name]).numpy(force=True).ravel()
        assert not moved[~mask].any()
        assert moved[mask].mean() > 0.9
        trained = module.weight.detach().flatten()[torch.from_numpy(mask)]
        assert torch.equal(trained.cpu(), adapter.state()[f"{name}.values"])


class TargetsAdapter(FullAdapter):
    """Dense training of the target matrices, the rest frozen."""

    def make(self, backbone: Backbone) -> dict[str, nn.Parameter]:
        body = super().make(backbone)
        return {f"{name}.weight": body[f"{name}.weight"] for name in backbone.targets}

    def anchors(self) -> dict[str, Tensor]:
        return {n: t for n, t in self._before.items() if n in self._trained}


@pytest.mark.parametrize("structure", ["unstructured", "rows", "columns"])
def test_full_density_is_dense_training(
    folder: Path, examples: Examples, structure: str
) -> None:
    recipe = RecipeConfig(
        epochs=3,
        batch_size=8,
        optimizer="sgd",
        lr=0.02,
        momentum=0.9,
        weight_decay=0.01,
    )
    states = []
    for adapter in (
        TargetsAdapter(),
        SparseAdapter(1.0, structure, 0),
    ):
        backbone = load_tiny(folder)
        adapter.attach(backbone)
        train(backbone, adapter, examples, recipe, KEY)
        states.append(adapter.state())
    dense, masked = states
    assert len(dense) == len(masked)
    fresh = load_tiny(folder).model
    for name, expected in dense.items():
        own = name if name in masked else name.replace(".weight", ".values")
        got = masked[own].view_as(expected)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
        assert not torch.equal(expected, fresh.get_parameter(name).cpu())


@pytest.mark.parametrize("density", [DENSITY, 0.02])
@pytest.mark.parametrize("structure", ["unstructured", "rows", "columns"])
def test_gradient_is_the_dense_one_at_the_mask(
    folder: Path, examples: Examples, structure: str, density: float
) -> None:
    dense = load_tiny(folder)
    weights = [module.weight.requires_grad_() for module in dense.targets.values()]
    expected = torch.autograd.grad(loss_of(dense, examples), weights)

    backbone = load_tiny(folder)
    adapter = SparseAdapter(density, structure, 5)
    adapter.attach(backbone)
    loss_of(backbone, examples).backward()
    for (name, module), gradient in zip(
        backbone.targets.items(), expected, strict=True
    ):
        position = make_mask(5, name, shape_of(module), density, structure)
        values = adapter.parameters()[list(backbone.targets).index(name)]
        assert values.grad is not None
        assert values.grad.abs().max() > 1e-4
        torch.testing.assert_close(
            values.grad.cpu(), gradient.flatten().cpu()[position], rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("structure", ["unstructured", "rows", "columns"])
def test_what_is_kept_for_the_backward_pass(structure: str) -> None:
    """An activation whole, or the columns' slice of it; never a weight."""
    module = nn.Linear(48, 32)
    module.requires_grad_(False)
    backbone = Backbone(nn.Sequential(module), None, {"0": module}, {})
    adapter = SparseAdapter(0.25, structure, 5)
    adapter.attach(backbone)
    x = torch.randn(10, 48, requires_grad=True)
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x)
    assert kept == [(10, 12 if structure == "columns" else 48)]


def test_no_dense_gradient_is_kept(backbone: Backbone, examples: Examples) -> None:
    adapter = SparseAdapter(DENSITY, "unstructured", 5)
    adapter.attach(backbone)
    loss_of(backbone, examples).backward()
    for module in backbone.targets.values():
        assert module.weight.grad is None
        assert not module.weight.requires_grad
    assert all(p.grad is not None for p in adapter.parameters())


def test_shared_layers_add_up_the_gradients_of_their_uses(
    tiny_models: dict[str, Path], examples: Examples
) -> None:
    """ALBERT's gradient is the sum over the layers of one with equal, unshared ones."""
    shared = load_tiny(tiny_models["albert"])
    adapter = SparseAdapter(1.0, "unstructured", 0)
    adapter.attach(shared)
    loss_of(shared, examples).backward()
    group = "albert.encoder.albert_layer_groups"
    values = dict(zip(adapter.shapes(), adapter.parameters(), strict=True))
    query = values[f"{group}.0.albert_layers.0.attention.query.values"].grad
    assert query is not None

    config = AlbertConfig.from_pretrained(tiny_models["albert"], num_labels=3)
    config.num_hidden_groups = 2
    unshared = AlbertForSequenceClassification(config)
    weights = copy_parameters(shared.model)
    weights |= {n.replace("groups.0", "groups.1"): w for n, w in weights.items()}
    unshared.load_state_dict(weights)
    copy = Backbone(unshared, None, {}, {})
    loss_of(copy, examples).backward()
    uses = [
        unshared.get_parameter(f"{group}.{i}.albert_layers.0.attention.query.weight")
        for i in range(2)
    ]
    assert uses[0].grad is not None
    assert uses[1].grad is not None
    assert min(float(use.grad.abs().max()) for use in uses if use.grad is not None) > 0
    expected = (uses[0].grad + uses[1].grad).flatten()
    torch.testing.assert_close(query.cpu(), expected, rtol=1e-4, atol=1e-7)
