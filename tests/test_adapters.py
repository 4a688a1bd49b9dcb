"""Adapters over model families: one matrix, then what each adapter promises."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    copy_parameters,
    load_tiny,
    logits,
    make_body,
    make_examples,
    make_tokenizer,
    perturb,
    save_checkpoint,
)
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)

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
from slora_flwr.adapters.masks import make_mask
from slora_flwr.backbone.load import Backbone, load_backbone
from slora_flwr.common.tensors import State
from slora_flwr.config import ConfigError, ModelConfig, RecipeConfig, methods, parse
from slora_flwr.config.methods import find_adapter
from slora_flwr.data.examples import Examples
from slora_flwr.training.loop import evaluate, train

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


def loss_of(backbone: Backbone, examples: Examples) -> Tensor:
    """Mean cross-entropy over all examples, without dropout, for autograd."""
    ids, mask, labels = examples.batch(np.arange(len(examples)))
    device = backbone.device
    out = backbone.model.eval()(
        input_ids=ids.to(device), attention_mask=mask.to(device)
    )
    return F.cross_entropy(out.logits, labels.to(device))


def shape_of(module: nn.Linear) -> tuple[int, int]:
    return module.out_features, module.in_features


def no_dropout(backbone: Backbone) -> Backbone:
    for module in backbone.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return backbone


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
    recipe = RecipeConfig(epochs=8, batch_size=8, lr=0.02)
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


# --- sparse


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

    def _make(self, backbone: Backbone) -> dict[str, nn.Parameter]:
        body = super()._make(backbone)
        return {f"{name}.weight": body[f"{name}.weight"] for name in backbone.targets}


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


# --- FedProx and clipping, on a head whose gradient is known in closed form


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


# --- backbones: head, targets, loading

HEADS = {
    "bert": ["classifier"],
    "distilbert": ["pre_classifier", "classifier"],
    "roberta": ["classifier.dense", "classifier.out_proj"],
    "albert": ["classifier"],
    "deberta-v2": ["pooler.dense", "classifier"],
}
BERT_LAYER = [
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]
TARGETS = {
    "bert": [f"bert.encoder.layer.{i}.{n}" for i in (0, 1) for n in BERT_LAYER],
    "distilbert": [
        f"distilbert.transformer.layer.{i}.{name}"
        for i in (0, 1)
        for name in (
            "attention.q_lin",
            "attention.k_lin",
            "attention.v_lin",
            "attention.out_lin",
            "ffn.lin1",
            "ffn.lin2",
        )
    ],
    "roberta": [f"roberta.encoder.layer.{i}.{n}" for i in (0, 1) for n in BERT_LAYER],
    "albert": [
        f"albert.encoder.albert_layer_groups.0.albert_layers.0.{name}"
        for name in (
            "attention.query",
            "attention.key",
            "attention.value",
            "attention.dense",
            "ffn",
            "ffn_output",
        )
    ],
    "deberta-v2": [
        f"deberta.encoder.layer.{i}.{name}"
        for i in (0, 1)
        for name in (
            "attention.self.query_proj",
            "attention.self.key_proj",
            "attention.self.value_proj",
            *BERT_LAYER[3:],
        )
    ],
}


def test_head_is_the_output_layers(family: str, backbone: Backbone) -> None:
    expected = [f"{m}.{part}" for m in HEADS[family] for part in ("weight", "bias")]
    assert list(backbone.head) == expected


def test_targets_are_the_linear_layers_of_the_blocks(
    family: str, backbone: Backbone
) -> None:
    assert set(backbone.targets) == set(TARGETS[family])
    shapes = {tuple(m.weight.shape) for m in backbone.targets.values()}
    assert shapes == {(32, 32), (48, 32), (32, 48)}


def test_head_is_fresh_and_seeded(folder: Path) -> None:
    model = ModelConfig(name=str(folder))
    one, same, other = (load_backbone(model, 3, seed) for seed in (3, 3, 4))
    for name, parameter in one.head.items():
        assert torch.equal(parameter, same.head[name])
        assert parameter.ndim == 1 or not torch.equal(parameter, other.head[name])
    assert one.digest == other.digest


def test_what_the_checkpoint_lacks_is_head(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    config = BertConfig.from_pretrained(tiny_models["bert"])
    save_checkpoint(BertModel(config, add_pooling_layer=False), tmp_path)
    assert set(load_tiny(tmp_path).head) == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }


def test_head_of_another_task_is_replaced(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    config = BertConfig.from_pretrained(tiny_models["bert"], num_labels=7)
    save_checkpoint(BertForSequenceClassification(config), tmp_path)
    head = load_tiny(tmp_path).head
    assert {name: tuple(p.shape) for name, p in head.items()} == {
        "classifier.weight": (3, 32),
        "classifier.bias": (3,),
    }


@pytest.mark.parametrize(
    ("targets", "ends"),
    [
        ("query,value", ["attention.self.query", "attention.self.value"]),
        ("attention.output.dense", ["attention.output.dense"]),
        (" key , intermediate.dense", ["attention.self.key", "intermediate.dense"]),
    ],
)
def test_targets_by_the_end_of_their_name(
    tiny_models: dict[str, Path], targets: str, ends: list[str]
) -> None:
    backbone = load_tiny(tiny_models["bert"], targets)
    expected = {f"bert.encoder.layer.{i}.{end}" for i in (0, 1) for end in ends}
    assert set(backbone.targets) == expected


@pytest.mark.parametrize("targets", ["quer", "query,pooler", "classifier", "uery"])
def test_unknown_targets_are_refused(
    tiny_models: dict[str, Path], targets: str
) -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets is .*query") as error:
        load_tiny(tiny_models["bert"], targets)
    assert repr(targets.split(",")[-1]) in str(error.value)


def attended(layer: Any, x: Tensor) -> Tensor:
    """Give what a block's attention adds to x, before any bottleneck."""
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
    with pytest.raises(LookupError, match="'prompt' is none of the adapters; known"):
        find_adapter("prompt").from_config(parse({}))


@pytest.mark.parametrize("missing", ["all", "config", "weights", "tokenizer"])
def test_missing_model_is_a_config_error(tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "model"
    if missing in ("weights", "tokenizer"):
        make_body("bert").save_pretrained(folder)
    if missing in ("weights", "config"):
        make_tokenizer().save_pretrained(folder)
    if missing == "weights":
        (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.name is"):
        load_backbone(ModelConfig(name=str(folder)), 3, 0)


def test_unreachable_hub_model_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"model\.name is 'no-such/model'"):
        load_backbone(ModelConfig(name="no-such/model"), 3, 0)


def test_training_order_covers_every_example_once() -> None:
    examples = make_examples(50)
    batches = list(examples.shuffled(8, np.random.Philox(key=1)))
    rows = np.concatenate(batches)
    assert sorted(rows.tolist()) == list(range(50))
    assert sorted(len(batch) for batch in batches) == [2, 8, 8, 8, 8, 8, 8]


def test_padding_does_not_reach_the_logits(
    backbone: Backbone, examples: Examples
) -> None:
    together = logits(backbone.model, examples)
    for row in (0, 7, 23):
        alone = logits(backbone.model, examples.select(np.array([row])))
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)


def test_real_checkpoint_has_its_targets(assets: Path) -> None:
    """MiniLM: 6 layers of 6 matrices; its pooler is in the checkpoint or is head."""
    folder = assets / "models" / "minilm-l6-h384-uncased"
    backbone = load_backbone(ModelConfig(name=str(folder)), 20, 0)
    assert len(backbone.targets) == 36
    assert sum(m.weight.numel() for m in backbone.targets.values()) == 6 * 12 * 384**2
    assert backbone.head["classifier.weight"].shape == (20, 384)
