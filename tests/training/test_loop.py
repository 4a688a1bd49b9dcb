"""Local training: FedProx, clipping, random streams and the order of examples."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slora_flwr.adapters import (
    Adapter,
    FullAdapter,
    HeadAdapter,
    HoulsbyAdapter,
    LowRankAdapter,
    SparseAdapter,
)
from slora_flwr.adapters.masks import make_mask
from slora_flwr.backbone.load import Backbone
from slora_flwr.common.tensors import State
from slora_flwr.config import RecipeConfig
from slora_flwr.data.examples import Examples
from slora_flwr.training.loop import train
from tests.support.tiny import load_tiny, loss_of, make_examples, no_dropout, shape_of

ADAMW = RecipeConfig(epochs=2, batch_size=8, lr=0.01, weight_decay=0.1)
KEY = (0, 1, 2)
ADAPTERS: dict[str, Callable[[], Adapter]] = {
    "sparse": lambda: SparseAdapter(0.1, "unstructured", 5),
    "lora": lambda: LowRankAdapter(4, 12.0),
    "houlsby": lambda: HoulsbyAdapter(4),
    "full": FullAdapter,
}


@pytest.fixture
def bert(tiny_models: dict[str, Path]) -> Backbone:
    return no_dropout(load_tiny(tiny_models["bert"]))


def head_gradient(
    features: np.ndarray, labels: np.ndarray, weight: np.ndarray, bias: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Gradient of the mean cross-entropy of softmax(features·Wᵀ + b)."""
    z = np.exp(features @ weight.T + bias)
    z /= z.sum(axis=1, keepdims=True)
    z -= np.eye(len(bias))[labels]
    return z.T @ features / len(labels), z.mean(axis=0)


def features_of(backbone: Backbone, examples: Examples) -> np.ndarray:
    seen: list[Tensor] = []
    hook = backbone.model.classifier.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0])
    )
    backbone.model.train()
    ids, mask, _ = examples.batch(np.arange(len(examples)))
    with torch.no_grad():
        for _ in range(2):
            backbone.model(
                input_ids=ids.to(backbone.device),
                attention_mask=mask.to(backbone.device),
            )
    hook.remove()
    assert torch.equal(*seen)  # no dropout
    return seen[0].double().cpu().numpy()


def head_of(state: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    weight, bias = state["classifier.weight"], state["classifier.bias"]
    return weight.double().numpy(), bias.double().numpy()


def test_fedprox_by_hand(bert: Backbone, examples: Examples) -> None:
    lr, mu = 0.3, 0.7
    adapter = HeadAdapter()
    adapter.attach(bert)
    features = features_of(bert, examples)
    w0, b0 = w, b = head_of(adapter.state())
    for _ in range(2):
        grad_w, grad_b = head_gradient(features, examples.labels, w, b)
        w, b = w - lr * (grad_w + mu * (w - w0)), b - lr * (grad_b + mu * (b - b0))

    recipe = RecipeConfig(epochs=2, batch_size=24, optimizer="sgd", lr=lr, prox=mu)
    train(bert, adapter, examples, recipe, KEY)
    got_w, got_b = head_of(adapter.state())
    np.testing.assert_allclose(got_w, w, rtol=0, atol=1e-6)
    np.testing.assert_allclose(got_b, b, rtol=0, atol=1e-6)
    plain_w = w0
    for _ in range(2):
        grad_w, _ = head_gradient(features, examples.labels, plain_w, b0)
        plain_w = plain_w - lr * grad_w
    assert np.abs(w - plain_w).max() > 1e-3  # mu matters here


@pytest.mark.parametrize("head_lr", [0.0, 0.75])
def test_the_head_steps_at_its_own_rate(
    bert: Backbone, examples: Examples, head_lr: float
) -> None:
    adapter = FullAdapter()
    adapter.attach(bert)
    start, lr = adapter.state(), 0.125
    loss_of(bert, examples).backward()
    named = zip(adapter.returned(), adapter.parameters(), strict=True)
    gradients = {name: p.grad.cpu() for name, p in named if p.grad is not None}
    for parameter in adapter.parameters():
        parameter.grad = None
    adapter.load(start)
    recipe = RecipeConfig(batch_size=24, optimizer="sgd", lr=lr, head_lr=head_lr)
    train(bert, adapter, examples, recipe, KEY)
    assert {name for name in gradients if name.startswith("classifier")}
    for name, after in adapter.state().items():
        if name in gradients:
            rate = (head_lr or lr) if name.startswith("classifier") else lr
            expected = start[name] - rate * gradients[name]
            torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)


def test_loss_of_training_is_the_mean_over_batches(
    bert: Backbone, examples: Examples
) -> None:
    adapter = HeadAdapter()
    adapter.attach(bert)
    w, b = head_of(adapter.state())
    z = features_of(bert, examples) @ w.T + b
    loss = np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), examples.labels]
    recipe = RecipeConfig(batch_size=24, optimizer="sgd", lr=1e-3)
    got = train(bert, adapter, examples, recipe, KEY)
    assert got == pytest.approx(loss.mean(), abs=1e-5)


@pytest.mark.parametrize("clip", [0.01, 100.0])
def test_clipping_uses_the_norm_of_what_is_trained(
    tiny_models: dict[str, Path], examples: Examples, clip: float
) -> None:
    """The dense gradient's norm would be about 1 / sqrt(density) times as large."""
    dense = no_dropout(load_tiny(tiny_models["bert"]))
    for parameter in dense.model.parameters():
        parameter.requires_grad_()
    loss_of(dense, examples).backward()
    gradients = {}
    for name, module in dense.targets.items():
        position = make_mask(5, name, shape_of(module), 0.05)
        assert module.weight.grad is not None
        gradients[f"{name}.values"] = module.weight.grad.flatten().cpu()[position]
    for name, parameter in dense.head.items():
        assert parameter.grad is not None
        gradients[name] = parameter.grad.cpu()
    norm = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
    assert 0.01 < norm < 100.0

    backbone = no_dropout(load_tiny(tiny_models["bert"]))
    adapter = SparseAdapter(0.05, "unstructured", 5)
    adapter.attach(backbone)
    start = adapter.state()
    recipe = RecipeConfig(batch_size=24, optimizer="sgd", lr=1.0, clip_norm=clip)
    train(backbone, adapter, examples, recipe, KEY)
    for name, after in adapter.state().items():
        expected = start[name] - gradients[name] * min(1.0, clip / norm)
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-5 * min(clip, 1.0))


def test_training_is_keyed_by_its_rng_key_alone(
    folder: Path, examples: Examples
) -> None:
    states = []
    for noise, rng_key in ((1, (0, 1, 2)), (2, (0, 1, 2)), (1, (0, 1, 3))):
        backbone = load_tiny(folder)
        adapter = HeadAdapter()
        adapter.attach(backbone)
        torch.manual_seed(noise)
        train(backbone, adapter, examples, ADAMW, rng_key)
        states.append(next(iter(adapter.state().values())))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_training_order_covers_every_example_once() -> None:
    examples = make_examples(50)
    batches = list(examples.shuffled(8, np.random.Philox(key=1)))
    rows = np.concatenate(batches)
    assert sorted(rows.tolist()) == list(range(50))
    assert sorted(len(batch) for batch in batches) == [7, 7, 7, 7, 7, 7, 8]


def _steps_taken(folder: Path, examples: Examples, **changes: Any) -> tuple[int, State]:
    """Return the number of steps that were taken, and what they ended at."""
    backbone, adapter = load_tiny(folder), HeadAdapter()
    adapter.attach(backbone)
    taken: list[int] = []
    adapter.commit = lambda: taken.append(1)  # type: ignore[method-assign]
    train(backbone, adapter, examples, replace(ADAMW, **changes), KEY)
    return len(taken), adapter.state()


def test_steps_are_bounded_within_epochs(folder: Path, examples: Examples) -> None:
    """24 examples in batches of 8 are three steps an epoch, six in two."""
    whole, state = _steps_taken(folder, examples)
    assert whole == 6
    for bound, taken in ((2, 2), (4, 4), (6, 6), (100, 6)):
        found, ended = _steps_taken(folder, examples, steps=bound)
        assert found == taken == replace(ADAMW, steps=bound).steps_of(24)
        same = all(torch.equal(ended[name], state[name]) for name in state)
        assert same == (taken == whole)
    # The first steps of an epoch are those of a bounded one.
    _, one = _steps_taken(folder, examples, epochs=1)
    _, three = _steps_taken(folder, examples, steps=3)
    assert all(torch.equal(one[name], three[name]) for name in one)


SPLIT: dict[str, dict[str, Any]] = {
    "parts": {"accumulate": 3},
    "tokens": {"tokens": 40},
    "both": {"accumulate": 2, "tokens": 30},
}


@pytest.mark.parametrize("split", SPLIT)
@pytest.mark.parametrize("adapter", ["sparse", "lora", "full"])
def test_a_step_in_parts_is_the_whole_step(
    tiny_models: dict[str, Path], examples: Examples, adapter: str, split: str
) -> None:
    found = [
        _trained(tiny_models["bert"], adapter, examples, changes)
        for changes in ({}, SPLIT[split])
    ]
    (whole, loss, passes), (parts, other, more) = found
    assert passes < more
    assert other == pytest.approx(loss, rel=1e-5)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", ["sparse", "lora", "houlsby", "full"])
def test_checkpointing_computes_twice_and_changes_no_bit(
    tiny_models: dict[str, Path], examples: Examples, adapter: str
) -> None:
    """With dropout too."""
    found = [
        _trained(tiny_models["bert"], adapter, examples, {"checkpointing": on}, 0.1)
        for on in (False, True)
    ]
    (plain, loss, passes), (again, other, more) = found
    assert more == 2 * passes
    assert other == loss
    assert all(torch.equal(again[name], tensor) for name, tensor in plain.items())


def _trained(
    folder: Path,
    name: str,
    examples: Examples,
    changes: dict[str, Any],
    dropout: float = 0.0,
) -> tuple[State, float, int]:
    """Return an adapter's state after two steps, the loss and a block's passes."""
    backbone = load_tiny(folder)
    for module in backbone.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    passes: list[None] = []
    block = backbone.model.bert.encoder.layer[1].attention
    block.register_forward_hook(lambda *_: passes.append(None))
    adapter = ADAPTERS[name]()
    adapter.attach(backbone)
    recipe = RecipeConfig(batch_size=12, lr=0.1, prox=0.1, optimizer="sgd", **changes)
    loss = train(backbone, adapter, examples, recipe, KEY)
    modules = backbone.model.modules()
    assert not any(getattr(m, "gradient_checkpointing", False) for m in modules)
    return adapter.state(), loss, len(passes)
