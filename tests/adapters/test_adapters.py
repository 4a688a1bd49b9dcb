"""Adapters over model families: one matrix, then what each adapter promises."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

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
from slora_flwr.adapters.base import StateError
from slora_flwr.adapters.low_rank import cut_ranks
from slora_flwr.backbone.load import Backbone
from slora_flwr.common.tensors import State
from slora_flwr.config import ConfigError, RecipeConfig, methods, parse
from slora_flwr.config.methods import find_adapter
from slora_flwr.data.examples import Examples
from slora_flwr.training.loop import evaluate, train
from tests.support.tiny import copy_parameters, load_tiny, logits, no_dropout, perturb

DENSITY = 0.2
ADAPTERS: dict[str, Callable[[], Adapter]] = {
    "full": FullAdapter,
    "bias": BiasAdapter,
    "head": HeadAdapter,
    "sparse": lambda: SparseAdapter(DENSITY, "unstructured", 5),
    "redrawn": lambda: SparseAdapter(DENSITY, "rows", 5, "equal", redrawn=True),
    "lora": lambda: LowRankAdapter(4, 12.0),
    "ffa": lambda: LowRankAdapter(4, 12.0, trains="b", orthonormal=True),
    "root-rank": lambda: LowRankAdapter(4, 12.0, scaling="root-rank", seed=3),
    "houlsby": lambda: HoulsbyAdapter(4),
    "pfeiffer": lambda: PfeifferAdapter(4),
}
ADAMW = RecipeConfig(epochs=2, batch_size=8, lr=0.01, weight_decay=0.1)
KEY = (0, 1, 2)


@pytest.fixture(params=ADAPTERS)
def adapter(request: pytest.FixtureRequest) -> Adapter:
    torch.manual_seed(17)  # LoRA's start
    return ADAPTERS[request.param]()


# --- every adapter on every family


def test_state_keeps_its_order(
    backbone: Backbone, adapter: Adapter, examples: Examples
) -> None:
    adapter.attach(backbone)
    names = list(adapter.state())
    assert names[-len(backbone.head) :] == list(backbone.head)
    layout = adapter.fingerprint()
    train(backbone, adapter, examples, ADAMW, KEY)
    assert list(adapter.state()) == list(adapter.shapes()) == names
    assert [p.shape for p in adapter.parameters()] == list(adapter.shapes().values())
    adapter.detach()
    adapter.attach(backbone)
    assert list(adapter.state()) == names
    assert adapter.fingerprint() == layout


def test_loading_a_state_gives_the_same_function(
    backbone: Backbone, adapter: Adapter, examples: Examples
) -> None:
    adapter.attach(backbone)
    train(backbone, adapter, examples, ADAMW, KEY)
    state, before = adapter.state(), logits(backbone.model, examples)
    adapter.load(perturb(state, 0.1))
    assert not torch.allclose(logits(backbone.model, examples), before, atol=1e-2)
    adapter.load(state)
    assert torch.equal(logits(backbone.model, examples), before)
    assert all(torch.equal(adapter.state()[name], state[name]) for name in state)


def test_state_is_a_copy(backbone: Backbone, adapter: Adapter) -> None:
    adapter.attach(backbone)
    state = adapter.state()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    adapter.load(perturb(state, 0.1))
    assert all(torch.equal(state[name], kept[name]) for name in state)


def test_detach_restores_every_bit(
    backbone: Backbone, adapter: Adapter, examples: Examples
) -> None:
    before, digest = copy_parameters(backbone.model), backbone.digest
    start = logits(backbone.model, examples)
    adapter.attach(backbone)
    train(backbone, adapter, examples, ADAMW, KEY)
    adapter.detach()
    after = dict(backbone.model.named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(p.requires_grad for p in after.values())
    assert all(p.grad is None for p in after.values())
    del backbone.digest  # it is cached
    assert backbone.digest == digest
    assert torch.equal(logits(backbone.model, examples), start)


def test_training_learns(
    backbone: Backbone, adapter: Adapter, examples: Examples
) -> None:
    adapter.attach(backbone)
    before = evaluate(backbone, examples).loss
    recipe = RecipeConfig(epochs=16, batch_size=8, lr=0.01)
    during = train(backbone, adapter, examples, recipe, KEY)
    assert evaluate(backbone, examples).loss < 0.8 * before
    assert 0 < during < before


def test_only_the_trained_parameters_move(
    backbone: Backbone, adapter: Adapter, examples: Examples
) -> None:
    resident = list(backbone.model.parameters())
    adapter.attach(backbone)
    masked = isinstance(adapter, SparseAdapter)
    ours = {id(p) for p in adapter.parameters()}
    if masked:
        ours |= {id(module.weight) for module in backbone.targets.values()}
    frozen = [(p, p.detach().clone()) for p in resident if id(p) not in ours]
    start = adapter.state()
    train(backbone, adapter, examples, ADAMW, KEY)
    assert all(torch.equal(p, before) for p, before in frozen)
    moved = adapter.state()
    for name, before in start.items():
        if "embeddings" not in name:  # there, rows of words that did not occur stay
            assert (moved[name] != before).float().mean() > 0.5, name


def test_unfit_states_are_refused(backbone: Backbone, adapter: Adapter) -> None:
    adapter.attach(backbone)
    state = adapter.state()
    first = next(iter(state))
    before = copy_parameters(backbone.model)
    for odd in (
        {name: tensor for name, tensor in state.items() if name != first},
        {**state, "unknown": torch.zeros(3)},
        {**state, first: state[first].flatten()[:-1]},
        {**state, "classifier.bias": torch.zeros(4)},
    ):
        with pytest.raises(StateError, match="does not fit"):
            adapter.load(odd)
    after = dict(backbone.model.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_bf16_recipe_stays_finite(
    backbone: Backbone, adapter: Adapter, examples: Examples
) -> None:
    adapter.attach(backbone)
    start = adapter.state()
    recipe = RecipeConfig(epochs=2, batch_size=8, lr=0.01, precision="bf16")
    assert np.isfinite(train(backbone, adapter, examples, recipe, KEY))
    for name, tensor in adapter.state().items():
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all()
        assert not torch.equal(tensor, start[name])
    assert np.isfinite(evaluate(backbone, examples, "bf16").loss)


def test_proximal_term_pulls_to_the_sent_state(
    backbone: Backbone, adapter: Adapter, examples: Examples
) -> None:
    """With lr·mu = 1 the term takes the first step back when the second is made.

    w1 = w0 - lr·g0; w2 = w1 - lr·(g1 + mu·(w1 - w0)) = w0 - lr·g1, so the distance
    from w0 is that of one step, against two without the term.
    """
    no_dropout(backbone)
    adapter.attach(backbone)
    start = adapter.state()

    def distance(prox: float) -> float:
        adapter.load(start)
        recipe = RecipeConfig(
            epochs=2, batch_size=99, optimizer="sgd", lr=1e-3, prox=prox
        )
        train(backbone, adapter, examples, recipe, KEY)
        moved = adapter.state()
        return float(sum((moved[n] - start[n]).square().sum() for n in start)) ** 0.5

    assert distance(1000.0) == pytest.approx(distance(0.0) / 2, rel=0.1)


def test_size_is_known_without_attaching(backbone: Backbone) -> None:
    configs = [
        parse({"sparse.density": 0.03, "lora.rank": 3, "sparse.mask": structure})
        for structure in ("unstructured", "rows", "columns")
    ]
    for name, config in itertools.product(methods.ADAPTERS, configs):
        adapter = find_adapter(name).from_config(config)
        adapter.attach(backbone)
        expected = sum(tensor.numel() for tensor in adapter.state().values())
        adapter.detach()
        assert find_adapter(name).state_size(config, backbone) == expected


def test_size_does_not_count_the_factors_that_are_attached(backbone: Backbone) -> None:
    config = parse({})
    found = [find_adapter(name) for name in methods.ADAPTERS]
    sizes = [adapter.state_size(config, backbone) for adapter in found]
    LowRankAdapter(4, 12.0).attach(backbone)
    assert [adapter.state_size(config, backbone) for adapter in found] == sizes


# --- low-rank


@pytest.mark.parametrize("phase_round", [1, 2])
def test_alternating_factors_take_turns(
    backbone: Backbone, examples: Examples, phase_round: int
) -> None:
    adapter = LowRankAdapter(4, 12.0, trains="in-turn")
    adapter.attach(backbone)
    start = perturb(adapter.state(), 0.05)  # B is no longer zero
    adapter.load(start)
    adapter.begin(phase_round)
    turn, other = ("lora_B", "lora_A") if phase_round == 1 else ("lora_A", "lora_B")
    assert not any(name.endswith(other) for name in adapter.returned())
    assert adapter.sent() == adapter.shapes()
    train(backbone, adapter, examples, ADAMW, KEY)
    for name, after in adapter.state().items():
        if name.endswith(other):
            assert torch.equal(after, start[name]), name
        else:
            assert name.endswith(turn) or name in backbone.head
            assert name in adapter.returned()
            assert (after != start[name]).float().mean() > 0.5, name


def test_a_cut_rank_trains_as_a_smaller_adapter(
    folder: Path, examples: Examples
) -> None:
    """Rank 4 cut to 2 with s = 12 / 4 computes what rank 2 with s = 6 / 2 does."""
    states: list[State] = []
    start: State = {}
    for rank, alpha in ((4, 12.0), (2, 6.0)):
        backbone = no_dropout(load_tiny(folder))
        adapter = LowRankAdapter(rank, alpha, seed=1)
        adapter.attach(backbone)
        if not start:
            start = cut_ranks(perturb(adapter.state(), 0.05), 2)
        adapter.load(
            {
                name: t[tuple(map(slice, adapter.shapes()[name]))]
                for name, t in start.items()
            }
        )
        train(backbone, adapter, examples, ADAMW, KEY)
        states.append(adapter.state())
    wide, narrow = states
    for name, tensor in narrow.items():
        inside = tuple(map(slice, tensor.shape))
        assert torch.allclose(wide[name][inside], tensor, atol=1e-5), name
        assert wide[name].count_nonzero() <= tensor.numel()


def test_frozen_a_is_the_same_everywhere(folder: Path) -> None:
    fingerprints, factors = set(), []
    for noise in (0, 1):
        torch.manual_seed(noise)
        backbone = load_tiny(folder)
        adapter = LowRankAdapter(4, 12.0, seed=7, trains="b", orthonormal=True)
        adapter.attach(backbone)
        fingerprints.add(adapter.fingerprint())
        factors.append(adapter.whole(adapter.state()))
    assert len(fingerprints) == 1
    for name in backbone.targets:
        a = factors[0][f"{name}.lora_A"]
        assert torch.equal(a, factors[1][f"{name}.lora_A"])
        assert torch.allclose(a @ a.T, torch.eye(4), atol=1e-5)
    other = LowRankAdapter(4, 12.0, seed=8, trains="b")
    other.attach(load_tiny(folder))
    assert other.fingerprint() not in fingerprints


def test_scaling_by_the_root_of_the_rank() -> None:
    assert LowRankAdapter(4, 12.0).scaling == 3.0
    assert LowRankAdapter(4, 12.0, scaling="root-rank").scaling == 6.0


# --- low rank


@pytest.mark.parametrize(("rank", "alpha"), [(4, 12.0), (3, 3.0), (8, 2.0)])
def test_lora_is_the_merged_weight(
    folder: Path, examples: Examples, rank: int, alpha: float
) -> None:
    backbone, merged = load_tiny(folder), load_tiny(folder)
    adapter = LowRankAdapter(rank, alpha)
    adapter.attach(backbone)
    before = logits(backbone.model, examples)
    torch.testing.assert_close(before, logits(merged.model, examples))  # B is zero
    state = perturb(adapter.state(), 0.1)
    adapter.load(state)
    with torch.no_grad():
        for name, module in merged.targets.items():
            product = state[f"{name}.lora_B"] @ state[f"{name}.lora_A"]
            module.weight += (alpha / rank * product).to(merged.device)
        for name, parameter in merged.head.items():
            parameter.copy_(state[name])
    after = logits(backbone.model, examples)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, logits(merged.model, examples), rtol=0, atol=1e-5)


def attended(layer: Any, x: Tensor) -> Tensor:
    """Return what a block's attention adds to x, before any bottleneck."""
    query, key, value = (
        getattr(layer.attention.self, name)(x).unflatten(-1, (4, -1)).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    mixed = F.scaled_dot_product_attention(query, key, value)
    return layer.attention.output.dense(mixed.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer"])
def test_bottlenecks_are_where_their_papers_have_them(
    tiny_models: dict[str, Path], kind: str
) -> None:
    """A block of BERT, by hand: x and y are what goes into and comes out of it."""
    backbone = load_tiny(tiny_models["bert"])
    adapter = find_adapter(kind)(4)
    adapter.attach(backbone)
    adapter.load(state := perturb(adapter.state(), 0.3))
    layer = backbone.model.eval().bert.encoder.layer[0]
    x = torch.randn(2, 5, 32)
    name = "bert.encoder.layer.0"

    def change(place: str, x: Tensor) -> Tensor:
        parts = (state[f"{place}.{part}"] for part in ("down.weight", "down.bias"))
        inner = F.linear(x, *parts)
        inner = F.gelu(inner) if kind == "houlsby" else F.relu(inner)
        return F.linear(inner, *(state[f"{place}.up.{p}"] for p in ("weight", "bias")))

    given = attended(layer, x)
    if kind == "houlsby":
        given = given + change(f"{name}.attention.output.dropout", given)
    middle = layer.attention.output.LayerNorm(x + given)
    given = layer.output.dense(F.gelu(layer.intermediate.dense(middle)))
    if kind == "houlsby":
        given = given + change(f"{name}.output.dropout", given)
        expected = layer.output.LayerNorm(middle + given)
    else:
        norm = layer.output.LayerNorm
        weight, bias, eps = norm.weight, norm.bias, norm.eps
        added = middle + given
        normed = F.layer_norm(added, (32,), weight, bias, eps)
        added = added + change(f"{name}.output.LayerNorm", normed)
        expected = F.layer_norm(added, (32,), weight, bias, eps)
    out = layer(x)
    out = out[0] if isinstance(out, tuple) else out
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_bitfit_trains_the_biases_alone(backbone: Backbone) -> None:
    adapter = BiasAdapter()
    adapter.attach(backbone)
    own = set(adapter.state()) - set(backbone.head)
    body = backbone.model.base_model
    linear = sum(m.bias.numel() for m in body.modules() if isinstance(m, nn.Linear))
    norms = sum(m.bias.numel() for m in body.modules() if isinstance(m, nn.LayerNorm))
    heads = [n for n in backbone.head if n.startswith(backbone.model.base_model_prefix)]
    in_head = sum(backbone.head[n].numel() for n in heads if n.endswith("bias"))
    found = sum(adapter.state()[n].numel() for n in own)
    assert found + in_head == linear + norms


def test_unknown_adapter_is_refused() -> None:
    with pytest.raises(ConfigError, match="'prompt' is none of the adapters; known"):
        find_adapter("prompt").from_config(parse({}))
