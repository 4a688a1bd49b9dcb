"""Weight decay: towards what the trained values differ from."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from slora_flwr.adapters import Adapter, FullAdapter, HeadAdapter, SparseAdapter
from slora_flwr.adapters.handoff import start_from_weights
from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.backbone.load import Backbone
from slora_flwr.common.tensors import State
from slora_flwr.config import RecipeConfig, Value, parse
from slora_flwr.data.examples import Examples
from slora_flwr.training.loop import train
from slora_flwr.training.trainer import Trainer
from tests.support.tiny import (
    CLASSES,
    hand_over,
    load_tiny,
    loss_of,
    no_dropout,
    perturb,
)

LR, DECAY, CLIP = 0.1, 0.5, 0.01
KEY = (0, 1, 2)
OPTIMIZERS = pytest.mark.parametrize("optimizer", ["adamw", "sgd"])


@pytest.fixture
def bert(tiny_models: dict[str, Path]) -> Backbone:
    return no_dropout(load_tiny(tiny_models["bert"]))


def one_step(
    backbone: Backbone,
    adapter: Adapter,
    examples: Examples,
    state: State,
    optimizer: str = "adamw",
    clip_norm: float = 0.0,
    head_lr: float = 0.0,
) -> tuple[State, State]:
    """Train one step from a state; return the state after it, and the gradients."""
    adapter.load(state)
    loss_of(backbone, examples).backward()
    named = zip(adapter.returned(), adapter.parameters(), strict=True)
    gradients = {}
    for name, parameter in named:
        assert parameter.grad is not None
        gradients[name] = parameter.grad.cpu()
        parameter.grad = None
    recipe = RecipeConfig(
        batch_size=len(examples),
        optimizer=optimizer,
        lr=LR,
        head_lr=head_lr,
        weight_decay=DECAY,
        clip_norm=clip_norm,
    )
    train(backbone, adapter, examples, recipe, KEY)
    return adapter.state(), gradients


def headless(state: State) -> State:
    """Return a state whose head passes no gradient on to what is below it."""
    return {
        name: tensor.zero_() if name.startswith("classifier") else tensor
        for name, tensor in state.items()
    }


def expect_decayed(found: Tensor, start: Tensor, anchor: Tensor) -> None:
    """Check one step without a gradient: lr·decay of the way to the anchor."""
    expected = start + LR * DECAY * (anchor - start)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    # What is at its anchor stays there, to the last bit.
    there = start == anchor
    assert torch.equal(found[there], anchor[there])


@pytest.mark.parametrize("structure", ["unstructured", "rows", "columns"])
@OPTIMIZERS
def test_sparse_values_without_a_gradient_decay_towards_w0(
    bert: Backbone, examples: Examples, structure: str, optimizer: str
) -> None:
    adapter = SparseAdapter(0.2, structure, 5)
    adapter.attach(bert)
    first = adapter.state()
    start = perturb(first, 0.1)
    for name in first:
        start[name][..., ::2] = first[name][..., ::2]
    start = headless(start)
    after, gradients = one_step(bert, adapter, examples, start, optimizer)
    values = [name for name in first if name.endswith(".values")]
    assert values
    for name in values:
        assert not gradients[name].any()
        assert (start[name] != first[name]).any()
        expect_decayed(after[name], start[name], first[name])


@OPTIMIZERS
def test_a_clipped_step_by_hand(
    bert: Backbone, examples: Examples, optimizer: str
) -> None:
    adapter = SparseAdapter(0.2, "unstructured", 5)
    adapter.attach(bert)
    first = adapter.state()
    start = perturb(first, 0.1)
    after, gradients = one_step(bert, adapter, examples, start, optimizer, CLIP)
    norm = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
    assert norm > CLIP
    for name, p in start.items():
        anchor = first[name] if name.endswith(".values") else torch.zeros(())
        g = gradients[name] * CLIP / norm
        # Adam's first step: the moments, freed of their bias, are g and g².
        step = g / (g.abs() + 1e-8) if optimizer == "adamw" else g
        expected = p - LR * DECAY * (p - anchor) - LR * step
        # Where the gradient is about 1e-8, Adam's step depends on its last bits.
        clear = g.abs() > 1e-6
        torch.testing.assert_close(
            after[name][clear], expected[clear], atol=1e-5, rtol=0
        )
        assert clear.float().mean() > 0.5


@OPTIMIZERS
@pytest.mark.parametrize("head_lr", [0.0, 0.25])
@pytest.mark.parametrize("kind", [HeadAdapter, FullAdapter])
def test_head_and_weights_decay_towards_0(
    bert: Backbone,
    examples: Examples,
    optimizer: str,
    kind: type[Adapter],
    head_lr: float,
) -> None:
    adapter = kind()
    adapter.attach(bert)
    start = adapter.state()
    start["classifier.bias"] = torch.ones_like(start["classifier.bias"])
    after, gradients = one_step(
        bert, adapter, examples, start, optimizer, head_lr=head_lr
    )
    for name, p in start.items():
        g = gradients[name]
        step = g / (g.abs() + 1e-8) if optimizer == "adamw" else g
        rate = (head_lr or LR) if name.startswith("classifier") else LR
        expected = p * (1 - rate * DECAY) - rate * step
        clear = g.abs() > 1e-6
        torch.testing.assert_close(
            after[name][clear], expected[clear], atol=1e-5, rtol=0
        )


@pytest.fixture
def trainer_values(tmp_path: Path, tiny_models: dict[str, Path]) -> dict[str, Value]:
    rows = [f"w{i} w{i + 1},{CLASSES[i % len(CLASSES)]}" for i in range(40)]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return {
        "model.name": str(tiny_models["bert"]),
        "data.name": str(path),
        "data.max-length": 8,
        "lora.rank": 4,
        "rounds": 4,
        "sparse.rounds": 2,
        "train.weight-decay": DECAY,
    }


def low_rank_start(
    trainer: Trainer, base: str, examples: Examples
) -> tuple[State, BaseWeights | None]:
    """Return the start of the last phase, and its base."""
    backbone, phase = trainer.model.backbone, trainer.schedule[-1]
    if not phase.primed:
        trains = phase.aggregator_type.trains
        if base == "federa":
            return start_from_weights(backbone, trainer.config.lora, trains)
        return {}, None
    sparse = SparseAdapter(0.2, "unstructured", 5)
    sparse.attach(backbone)
    learned = perturb(sparse.state(), 0.1)
    done = hand_over(backbone, sparse, learned, trainer.config.lora)
    return done.state, done.base


@pytest.mark.parametrize(
    ("method", "base", "aggregator", "towards_start"),
    [
        ("slora", "residual", "fedavg", True),
        ("slora", "residual", "alternate", True),
        ("slora", "residual", "flexlora", True),
        ("slora", "w0", "fedavg", False),
        ("slora", "warm-start", "fedavg", False),
        ("lora", "federa", "fedavg", True),
        ("lora", "peft", "fedavg", False),
        ("ffa-lora", "federa", "fedavg", True),
    ],
)
@OPTIMIZERS
def test_factors_decay_towards_the_start_that_the_base_subtracts(
    trainer_values: dict[str, Value],
    examples: Examples,
    method: str,
    base: str,
    aggregator: str,
    towards_start: bool,
    optimizer: str,
) -> None:
    key = "lora.base" if method == "slora" else "lora.start"
    values: dict[str, Value] = {"method": method, key: base}
    if aggregator != "fedavg":
        values["lora.aggregator"] = aggregator
    trainer = Trainer(parse(trainer_values | values))
    model, backbone = trainer.model, no_dropout(trainer.model.backbone)
    begun, weights = low_rank_start(trainer, base, examples)
    adapter = model.attach(trainer.schedule[-1], weights, "base")
    adapter.begin(1)
    first = adapter.state()
    first |= {name: t for name, t in begun.items() if name in first}
    start = perturb(first, 0.1)
    for name in first:
        start[name][..., ::2] = first[name][..., ::2]
    after, gradients = one_step(backbone, adapter, examples, headless(start), optimizer)
    factors = [name for name in adapter.returned() if ".lora_" in name]
    assert factors
    for name in factors:
        assert not gradients[name].any()
        anchor = first[name] if towards_start else torch.zeros_like(first[name])
        expect_decayed(after[name], start[name], anchor)


def test_values_of_a_mask_drawn_anew_decay_towards_w0(
    trainer_values: dict[str, Value], examples: Examples
) -> None:
    """Not towards the round's start, which earlier rounds have trained."""
    values: dict[str, Value] = {
        "method": "sft",
        "sparse.schedule": "per-round",
        "sparse.density": 1.0,
    }
    trainer = Trainer(parse(trainer_values | values))
    model, backbone = trainer.model, no_dropout(trainer.model.backbone)
    adapter = model.attach(trainer.schedule[0])
    adapter.begin(1)
    first = adapter.state()
    trained = perturb(first, 0.1)
    model.change_base([adapter.base_change(trained)], 1, "changed")
    adapter.begin(2)
    start = adapter.complete({n: trained[n] for n in backbone.head})
    for name in adapter.shapes():
        assert torch.equal(start[name], trained[name])
    after, _ = one_step(backbone, adapter, examples, headless(start))
    for name in first:
        if name.endswith(".values"):
            expect_decayed(after[name], start[name], first[name])


def test_no_decay_asks_for_no_anchors(
    bert: Backbone, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = SparseAdapter(0.2, "unstructured", 5)
    adapter.attach(bert)
    monkeypatch.delattr(SparseAdapter, "anchors")
    monkeypatch.delattr(Adapter, "anchors")
    train(bert, adapter, examples, RecipeConfig(lr=LR), KEY)
