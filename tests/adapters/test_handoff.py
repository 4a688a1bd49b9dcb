"""The handoff: truncated SVD, priming, the three bases, and what is refused."""

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slora_flwr.adapters import LowRankAdapter, SparseAdapter, handoff
from slora_flwr.adapters.handoff import Handoff, prime_low_rank
from slora_flwr.adapters.masks import make_mask
from slora_flwr.adapters.priming import (
    ROWS,
    HandoffError,
    check_equal,
    check_primed,
    prime,
)
from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.backbone.load import Backbone, load_backbone
from slora_flwr.common.svd import DENSE_SIDE, TruncatedSvd, truncated_svd
from slora_flwr.common.tensors import State
from slora_flwr.config import LoraConfig, ModelConfig, RecipeConfig
from slora_flwr.data.examples import Examples
from slora_flwr.training.loop import evaluate, train
from tests.support.tiny import (
    copy_parameters,
    hand_over,
    load_tiny,
    logits,
    make_examples,
    perturb,
)

Array = NDArray[np.float64]
BASES = ("residual", "w0", "warm-start")
RECIPE = RecipeConfig(epochs=2, batch_size=8, lr=0.02, weight_decay=0.1)
RANK, ALPHA = 4, 12.0


def sparse_matrix(
    shape: tuple[int, int], entries: int, seed: int = 0
) -> tuple[NDArray[np.int64], Array, Array]:
    """Draw positions and values, and the dense matrix that they make."""
    random = np.random.default_rng(seed)
    positions = np.sort(random.choice(shape[0] * shape[1], entries, replace=False))
    values = random.normal(size=entries)
    dense = np.zeros(shape[0] * shape[1])
    dense[positions] = values
    return positions, values, dense.reshape(shape)


def truncate(dense: Array, rank: int) -> Array:
    u, s, vt = np.linalg.svd(dense, full_matrices=False)
    result: Array = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return result


def product(svd: TruncatedSvd) -> Array:
    result: Array = svd.u @ np.diag(svd.s) @ svd.vt
    return result


# --- truncated SVD


@pytest.mark.parametrize(
    ("shape", "entries"),
    [
        ((30, 50), 200),  # dense
        ((50, 30), 200),
        ((200, 320), 1280),  # Lanczos, 2%
        ((320, 200), 1280),
    ],
)
def test_truncated_svd_is_lapacks(shape: tuple[int, int], entries: int) -> None:
    rank = 6
    positions, values, dense = sparse_matrix(shape, entries)
    svd = truncated_svd(positions, values, shape, rank)
    s = np.linalg.svd(dense, compute_uv=False)
    assert (svd.u.shape, svd.vt.shape) == ((shape[0], rank), (rank, shape[1]))
    np.testing.assert_allclose(svd.s, s[:rank], rtol=1e-10)
    np.testing.assert_allclose(product(svd), truncate(dense, rank), atol=1e-9)
    np.testing.assert_allclose(svd.u.T @ svd.u, np.eye(rank), atol=1e-10)
    np.testing.assert_allclose(svd.vt @ svd.vt.T, np.eye(rank), atol=1e-10)
    assert svd.energy == pytest.approx((s[:rank] ** 2).sum() / (s**2).sum(), rel=1e-10)


def test_dense_and_lanczos_paths_agree_in_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (200, 320)
    assert min(shape) > DENSE_SIDE
    positions, values, _ = sparse_matrix(shape, 1280)
    lanczos = truncated_svd(positions, values, shape, 5)
    monkeypatch.setattr("slora_flwr.common.svd.DENSE_SIDE", 1000)
    monkeypatch.setattr("scipy.sparse.linalg.svds", None)
    dense = truncated_svd(positions, values, shape, 5)
    np.testing.assert_allclose(lanczos.u, dense.u, atol=1e-8)
    np.testing.assert_allclose(lanczos.vt, dense.vt, atol=1e-8)


def test_large_matrices_go_by_lanczos(monkeypatch: pytest.MonkeyPatch) -> None:
    positions, values, _ = sparse_matrix((200, 320), 1280)
    monkeypatch.setattr(np.linalg, "svd", None)
    truncated_svd(positions, values, (200, 320), 5)


@pytest.mark.parametrize("structure", ["rows", "columns"])
@pytest.mark.parametrize(("density", "rank"), [(0.03, 4), (0.03, 12), (0.5, 6)])
def test_whole_lines_are_factored_exactly(
    structure: str, density: float, rank: int
) -> None:
    shape = (200, 320)
    positions = make_mask(3, "w", shape, density, structure)
    values = np.random.default_rng(0).normal(size=len(positions))
    dense = np.zeros(shape[0] * shape[1])
    dense[positions] = values
    dense = dense.reshape(shape)
    svd = truncated_svd(positions, values, shape, rank)
    np.testing.assert_allclose(product(svd), truncate(dense, rank), atol=1e-9)
    np.testing.assert_allclose(svd.u.T @ svd.u, np.eye(rank), atol=1e-9)
    np.testing.assert_allclose(svd.vt @ svd.vt.T, np.eye(rank), atol=1e-9)
    if density == 0.03 and rank == 12:  # 6 rows, 10 columns
        assert svd.energy == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [(20, 30), (200, 320)])
@pytest.mark.parametrize("entries", [1, 3])
def test_rank_above_that_of_the_delta(shape: tuple[int, int], entries: int) -> None:
    positions, values, dense = sparse_matrix(shape, entries)
    svd = truncated_svd(positions, values, shape, 6)
    np.testing.assert_allclose(product(svd), dense, atol=1e-7)
    assert svd.energy == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [(20, 30), (200, 320)])
@pytest.mark.parametrize("factors", ["balanced", "b"])
def test_zero_delta_primes_zero(shape: tuple[int, int], factors: str) -> None:
    positions, values, _ = sparse_matrix(shape, 50)
    svd = truncated_svd(positions, 0.0 * values, shape, 4)
    assert svd.energy == 0.0
    a, b = prime(svd, 2.0, factors)
    assert (a.shape, b.shape) == ((4, shape[1]), (shape[0], 4))
    assert a.isfinite().all()
    assert not b.any()


def test_full_rank_keeps_all_energy() -> None:
    positions, values, dense = sparse_matrix((30, 20), 150)
    svd = truncated_svd(positions, values, (30, 20), 20)
    np.testing.assert_allclose(product(svd), dense, atol=1e-12)
    assert svd.energy == pytest.approx(1.0)


def test_rank_above_the_smaller_side_is_refused() -> None:
    positions, values, _ = sparse_matrix((30, 20), 150)
    with pytest.raises(ValueError, match="rank is 21; allowed: up to 20"):
        truncated_svd(positions, values, (30, 20), 21)


# --- priming


@pytest.mark.parametrize(("alpha", "rank"), [(4.0, 4), (8.0, 4), (1.0, 4), (16.0, 6)])
@pytest.mark.parametrize("factors", ["balanced", "b"])
def test_scaling_divides_the_factors_once(
    alpha: float, rank: int, factors: str
) -> None:
    positions, values, dense = sparse_matrix((30, 50), 300)
    svd = truncated_svd(positions, values, (30, 50), rank)
    a, b = prime(svd, alpha / rank, factors)
    assert (a.shape, b.shape) == ((rank, 50), (30, rank))
    assert a.dtype == b.dtype == torch.float32
    got = alpha / rank * b.double().numpy() @ a.double().numpy()
    np.testing.assert_allclose(got, truncate(dense, rank), atol=1e-6)


def test_balanced_factors_share_each_singular_value() -> None:
    positions, values, dense = sparse_matrix((30, 50), 300)
    a, b = prime(truncated_svd(positions, values, (30, 50), 5), 2.0, "balanced")
    s = np.linalg.svd(dense, compute_uv=False)[:5]
    np.testing.assert_allclose(a.norm(dim=1), np.sqrt(s / 2.0), rtol=1e-5)
    np.testing.assert_allclose(b.norm(dim=0), np.sqrt(s / 2.0), rtol=1e-5)


def test_factors_b_leave_orthonormal_rows_in_a() -> None:
    positions, values, dense = sparse_matrix((30, 50), 300)
    a, b = prime(truncated_svd(positions, values, (30, 50), 5), 2.0, "b")
    s = np.linalg.svd(dense, compute_uv=False)[:5]
    np.testing.assert_allclose(a @ a.T, np.eye(5), atol=1e-6)
    np.testing.assert_allclose(b.norm(dim=0), s / 2.0, rtol=1e-5)


def test_unknown_factors_are_refused() -> None:
    positions, values, _ = sparse_matrix((30, 50), 300)
    with pytest.raises(ValueError, match="'a'; allowed: balanced, b"):
        prime(truncated_svd(positions, values, (30, 50), 5), 1.0, "a")


# --- the handoff over families


def learn(
    backbone: Backbone, examples: Examples, density: float = 0.1
) -> tuple[SparseAdapter, dict[str, Tensor]]:
    """Run a short sparse phase; its adapter stays attached."""
    sparse = SparseAdapter(density, "unstructured", 5)
    sparse.attach(backbone)
    train(backbone, sparse, examples, RECIPE, (0, 1, 0))
    return sparse, sparse.state()


def config_of(base: str, factors: str = "balanced") -> LoraConfig:
    return LoraConfig(rank=RANK, alpha=ALPHA, base=base, factors=factors)


def enter(backbone: Backbone, done: Handoff) -> LowRankAdapter:
    """Start the low-rank phase as a node does."""
    frozen = done.base.apply(backbone) if done.base is not None else {}
    lora = LowRankAdapter(RANK, ALPHA, frozen=frozen)
    lora.attach(backbone)
    lora.load(done.state)
    return lora


def delta_of(weight: Tensor, positions: NDArray[np.int64], values: Tensor) -> Array:
    """W - W_0 in float64, from the weight W_0 and the values that W has."""
    before = weight.detach().double().cpu().numpy()
    after = before.copy()
    after.reshape(-1)[positions] = values.double().numpy()
    difference: Array = after - before
    return difference


@pytest.mark.parametrize("base", ["residual", "warm-start"])
@pytest.mark.parametrize("factors", ["balanced", "b"])
def test_function_is_continuous(
    backbone: Backbone, examples: Examples, base: str, factors: str
) -> None:
    start = logits(backbone.model, examples)
    sparse, state = learn(backbone, examples)
    learned = logits(backbone.model, examples)
    assert (learned - start).abs().max() > 0.1
    done = hand_over(backbone, sparse, state, config_of(base, factors))
    enter(backbone, done)
    torch.testing.assert_close(
        logits(backbone.model, examples), learned, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("base", BASES)
def test_effective_weights_are_what_the_base_says(
    folder: Path, backbone: Backbone, examples: Examples, base: str
) -> None:
    """Against W_0 and NumPy's SVD; a model with these weights has the same logits."""
    by_hand = load_tiny(folder)
    sparse, state = learn(backbone, examples)
    positions = sparse.masks(backbone)
    done = hand_over(backbone, sparse, state, config_of(base))
    with torch.no_grad():
        for name, module in by_hand.targets.items():
            delta = delta_of(module.weight, positions[name], state[f"{name}.values"])
            kept = truncate(delta, RANK)
            energy = (kept**2).sum() / (delta**2).sum()
            assert done.energies[name] == pytest.approx(energy, rel=1e-6)
            assert 0 < energy < 1
            primed = ALPHA / RANK * done.state[f"{name}.lora_B"].double().numpy()
            primed = primed @ done.state[f"{name}.lora_A"].double().numpy()
            wanted = np.zeros_like(kept) if base == "warm-start" else kept
            np.testing.assert_allclose(primed, wanted, atol=1e-6)
            module.weight += torch.from_numpy(kept if base == "w0" else delta).to(
                module.weight
            )
        for name, parameter in by_hand.head.items():
            parameter.copy_(state[name])
    enter(backbone, done)
    torch.testing.assert_close(
        logits(backbone.model, examples),
        logits(by_hand.model, examples),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("base", BASES)
def test_head_is_carried_over_and_backbone_is_w0(
    backbone: Backbone, examples: Examples, base: str
) -> None:
    before = copy_parameters(backbone.model)
    sparse, state = learn(backbone, examples)
    done = hand_over(backbone, sparse, state, config_of(base))
    after = dict(backbone.model.named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    for name in backbone.head:
        assert torch.equal(done.state[name], state[name])
        assert not torch.equal(done.state[name], before[name].cpu())
    lora = LowRankAdapter(RANK, ALPHA)
    lora.attach(backbone)
    assert list(done.state) == list(lora.shapes())
    assert (done.base is None) == (base == "w0")
    assert done.base is None or bool(done.base.a) == (base == "residual")
    assert set(done.energies) == set(backbone.targets)


@pytest.fixture
def bert(tiny_models: dict[str, Path]) -> Backbone:
    return load_tiny(tiny_models["bert"])


@pytest.mark.parametrize("base", BASES)
def test_every_primed_matrix_goes_on_learning(
    bert: Backbone, examples: Examples, base: str
) -> None:
    sparse, state = learn(bert, examples)
    done = hand_over(bert, sparse, state, config_of(base))
    lora = enter(bert, done)
    train(bert, lora, examples, RECIPE, (0, 2, 0))
    moved = lora.state()
    assert all(not torch.equal(moved[name], done.state[name]) for name in moved)


@pytest.mark.parametrize("base", BASES)
def test_nothing_learned_is_nothing_handed_over(
    bert: Backbone, examples: Examples, base: str
) -> None:
    start = logits(bert.model, examples)
    sparse = SparseAdapter(0.1, "unstructured", 5)
    sparse.attach(bert)
    done = hand_over(bert, sparse, sparse.state(), config_of(base))
    assert set(done.energies.values()) == {0.0}
    enter(bert, done)
    torch.testing.assert_close(logits(bert.model, examples), start, rtol=0, atol=1e-6)


@pytest.mark.parametrize("base", BASES)
def test_a_small_delta_on_large_weights_is_handed_over(
    bert: Backbone, base: str
) -> None:
    """Pretrained matrices have entries of several units; float32 rounds these."""
    with torch.no_grad():
        for module in bert.targets.values():
            module.weight[:4] *= 10.0
    sparse = SparseAdapter(0.1, "unstructured", 5)
    sparse.attach(bert)
    state = {
        name: tensor if name in bert.head else moved
        for (name, tensor), moved in zip(
            sparse.state().items(), perturb(sparse.state(), 1e-3).values(), strict=True
        )
    }
    done = hand_over(bert, sparse, state, config_of(base))
    assert min(done.energies.values()) > 0.2


@pytest.mark.parametrize("base", BASES)
def test_bf16_backbone_is_handed_over(
    tiny_models: dict[str, Path], examples: Examples, base: str
) -> None:
    model = ModelConfig(name=str(tiny_models["bert"]), dtype="bfloat16")
    backbone = load_backbone(model, 3, 0)
    before = copy_parameters(backbone.model)
    sparse, state = learn(backbone, examples)
    learned = evaluate(backbone, examples, "bf16").loss
    done = hand_over(backbone, sparse, state, config_of(base))
    after = dict(backbone.model.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in before)
    enter(backbone, done)
    if base != "w0":
        assert evaluate(backbone, examples, "bf16").loss == pytest.approx(
            learned, abs=0.02
        )


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all tensors made inside and not yet freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return found

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        at, size = storage.data_ptr(), storage.nbytes()
        if at not in self._seen:
            self._seen.add(at)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(tensor, self._free, at, size)

    def _free(self, at: int, size: int) -> None:
        self._seen.discard(at)
        self.now -= size


@pytest.mark.parametrize("base", BASES)
def test_no_copy_of_the_matrices_is_made(bert: Backbone, base: str) -> None:
    sparse = SparseAdapter(0.02, "unstructured", 5)
    sparse.attach(bert)
    state = perturb(sparse.state(), 1e-2)
    positions, values = sparse.learned(state, rounds=0)
    sparse.detach()
    head = {name: state[name] for name in bert.head}
    config = LoraConfig(rank=1, base=base)
    with LiveBytes() as live:
        prime_low_rank(bert, positions, values, head, config)
    assert 0 < live.peak < 4 * bert.target_size / 2


# --- what is refused


def svd_and_factors(size: float = 1.0) -> tuple[TruncatedSvd, Tensor, Tensor]:
    positions, values, _ = sparse_matrix((12, 12), 20)
    svd = truncated_svd(positions, size * values, (12, 12), 12)
    return svd, *prime(svd, 3.0, "balanced")


@pytest.mark.parametrize("base", ["residual", "w0"])
def test_wrong_factors_are_refused(base: str) -> None:
    svd, a, b = svd_and_factors()
    check_primed(a, b, 3.0, svd, base, "layer")
    for wrong_a, wrong_b in (
        (a, b / 3.0),  # s left out
        (a, b * 3.0),  # s twice
        (b.T, a.T),  # transposed: square, so that only the values tell
        (a, b * 0.0),
        (a, b * float("nan")),
    ):
        with pytest.raises(HandoffError, match=f"layer is off by .* base {base}"):
            check_primed(wrong_a, wrong_b, 3.0, svd, base, "layer")


def test_factors_are_checked_to_the_last_row() -> None:
    """More rows than are checked at a time; and of a wide matrix, transposed."""
    shape = (ROWS + 44, 40)
    positions, values, _ = sparse_matrix(shape, 400)
    svd = truncated_svd(positions, values, shape, 5)
    a, b = prime(svd, 3.0, "balanced")
    check_primed(a, b, 3.0, svd, "w0", "layer")
    for wrong_a, wrong_b in ((b.T, a.T), (a, torch.cat([b[:-1], b[-1:] + 0.1]))):
        with pytest.raises(HandoffError, match="layer is off by"):
            check_primed(wrong_a, wrong_b, 3.0, svd, "w0", "layer")


def test_zero_b_is_refused_however_small_the_delta() -> None:
    svd, a, b = svd_and_factors(1e-10)
    check_primed(a, b, 3.0, svd, "residual", "layer")
    with pytest.raises(HandoffError, match="B of layer is zero"):
        check_primed(a, b * 0.0, 3.0, svd, "residual", "layer")
    nothing, a, b = svd_and_factors(0.0)
    check_primed(a, b, 3.0, nothing, "residual", "layer")


def test_equal_means_every_bit() -> None:
    stored = torch.tensor([0.5, -2.0])
    check_equal(stored.clone(), stored, "residual", "layer")
    for wrong in (
        stored.nextafter(torch.zeros(2)),
        torch.tensor([0.5, float("nan")]),
        stored[:1],
    ):
        with pytest.raises(HandoffError, match="layer is off by"):
            check_equal(wrong, stored, "residual", "layer")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", ["values left out", "moved", "other factors"])
def test_wrong_base_is_refused(
    tiny_models: dict[str, Path],
    examples: Examples,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    fault: str,
) -> None:
    """Deltas below the rounding of the largest weights in bf16."""

    class Wrong(BaseWeights):
        def apply(self, backbone: Backbone, *, changes: bool = False) -> State:
            if fault == "other factors":
                self.b = {n: t * 1.001 for n, t in self.b.items()}
                return super().apply(backbone, changes=changes)
            right, self.values = self.values, {}
            if fault == "moved":
                self.values = {n: t.roll(1) for n, t in right.items()}
            frozen = super().apply(backbone, changes=changes)
            self.values = right
            return frozen

    model = ModelConfig(name=str(tiny_models["bert"]), dtype=dtype)
    backbone = load_backbone(model, 3, 0)
    sparse, _ = learn(backbone, examples)
    with torch.no_grad():
        for module in backbone.targets.values():
            module.weight[0, 0] = 8.0
    state = perturb(sparse.state(), 1e-2)
    monkeypatch.setattr(handoff, "BaseWeights", Wrong)
    with pytest.raises(HandoffError, match=r"bert\.encoder\.layer"):
        hand_over(backbone, sparse, state, config_of("residual"))


@pytest.mark.parametrize("fault", ["scaled", "transposed", "zero"])
@pytest.mark.parametrize("base", ["residual", "w0"])
def test_handoff_with_wrong_factors_is_refused(
    tiny_models: dict[str, Path],
    examples: Examples,
    monkeypatch: pytest.MonkeyPatch,
    base: str,
    fault: str,
) -> None:
    """Square targets, where a transposed product has a fitting shape."""

    def wrong(svd: TruncatedSvd, scaling: float, factors: str) -> tuple[Tensor, Tensor]:
        a, b = prime(svd, scaling, factors)
        if fault == "scaled":
            return a, b * scaling
        return (b.T, a.T) if fault == "transposed" else (a, b * 0.0)

    backbone = load_tiny(tiny_models["bert"], "query,value")
    sparse, state = learn(backbone, examples)
    monkeypatch.setattr(handoff, "prime", wrong)
    with pytest.raises(HandoffError, match=r"bert\.encoder\.layer"):
        hand_over(backbone, sparse, state, config_of(base))


# --- the base patch


def random_patch(backbone: Backbone, rank: int) -> BaseWeights:
    sparse = SparseAdapter(0.1, "unstructured", 5)
    positions = sparse.masks(backbone)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    targets = backbone.targets.items()
    values = {name: draw(len(positions[name])) for name in backbone.targets}
    a = {name: draw(rank, m.in_features) for name, m in targets} if rank else {}
    b = {name: draw(m.out_features, rank) for name, m in targets} if rank else {}
    return BaseWeights(positions, values, a, b, 0.75)


def load_as(folder: Path, dtype: str) -> Backbone:
    return load_backbone(ModelConfig(name=str(folder), dtype=dtype), 3, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 3])
def test_base_is_w0_but_for_the_sparse_values(
    folder: Path, dtype: str, rank: int
) -> None:
    """Bit for bit, and so is W_0 afterwards; only masked entries are kept aside."""
    backbone = load_as(folder, dtype)
    before = copy_parameters(backbone.model)
    patch = random_patch(backbone, rank)
    frozen = patch.apply(backbone)
    assert frozen == patch.factors()
    assert len(frozen) == (2 * len(backbone.targets) if rank else 0)
    for name, module in backbone.targets.items():
        expected = before[f"{name}.weight"].clone()
        at = torch.from_numpy(patch.positions[name])
        expected.view(-1)[at] = patch.values[name].to(expected.dtype)
        assert torch.equal(module.weight, expected)
        assert patch.before[name].shape == patch.values[name].shape
    patch.remove(backbone)
    after = dict(backbone.model.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_base_that_rounds_change_is_in_the_weights(backbone: Backbone) -> None:
    before = copy_parameters(backbone.model)
    patch = random_patch(backbone, 3)
    frozen = patch.apply(backbone, changes=True)
    assert set(frozen) == {f"{name}.lora_A" for name in backbone.targets}
    for name, module in backbone.targets.items():
        expected = before[f"{name}.weight"].double().cpu().numpy().copy()
        flat = expected.reshape(-1)
        flat[patch.positions[name]] = patch.values[name].numpy()
        expected -= 0.75 * (patch.b[name].double() @ patch.a[name].double()).numpy()
        got = module.weight.numpy(force=True)
        np.testing.assert_allclose(got, expected, atol=1e-5)
        with torch.no_grad():
            module.weight.mul_(2.0)  # as a round would
    patch.remove(backbone)
    after = dict(backbone.model.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("trains", ["both", "b"])
def test_frozen_factors_are_subtracted(backbone: Backbone, trains: str) -> None:
    """W_0 - s·B_0·A_0 + s·B·A, by a dense matrix; gradients of B and A alone."""
    patch = random_patch(backbone, 3)
    lora = LowRankAdapter(3, 2.25, trains=trains, frozen=patch.apply(backbone))
    lora.attach(backbone)
    state = perturb(lora.state(), 0.1)
    lora.load(state)
    whole = lora.whole(state)
    assert len(lora.parameters()) == len(lora.shapes())
    for name, module in backbone.targets.items():
        layer = backbone.model.get_submodule(name)
        a, b = whole[f"{name}.lora_A"], whole[f"{name}.lora_B"]
        dense = module.weight.double().cpu() + 0.75 * (
            b.double() @ a.double() - patch.b[name].double() @ patch.a[name].double()
        )
        x = torch.randn(5, module.in_features, generator=torch.Generator())
        expected = x.double() @ dense.T
        if module.bias is not None:
            expected += module.bias.double().cpu()
        found = layer(x.to(backbone.device)).double().cpu()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        layer(x.to(backbone.device)).square().sum().backward()
        gradient = layer.lora_B["default"].weight.grad
        assert gradient is not None
        assert gradient.shape == b.shape
    lora.detach()


def test_equal_factors_cancel_in_bf16(tiny_models: dict[str, Path]) -> None:
    """However large they are; two separate products would each be rounded."""
    backbone = load_as(tiny_models["bert"], "bfloat16")
    examples = make_examples()
    patch = random_patch(backbone, 3)
    sparse_alone = BaseWeights(patch.positions, patch.values)
    sparse_alone.apply(backbone)
    expected = evaluate(backbone, examples, "bf16").loss
    sparse_alone.remove(backbone)
    lora = LowRankAdapter(3, 2.25, frozen=patch.apply(backbone))
    lora.attach(backbone)
    lora.load(lora.state() | patch.factors())
    found = evaluate(backbone, examples, "bf16").loss
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("rank", [0, 3])
def test_patch_travels(folder: Path, backbone: Backbone, rank: int) -> None:
    patch = random_patch(backbone, rank)
    state = patch.state()
    factors = "ab" if rank else ""
    shapes = BaseWeights.shapes(backbone, patch.positions, rank, factors)
    assert {name: tuple(t.shape) for name, t in state.items()} == shapes
    assert list(state) == list(shapes)
    again = BaseWeights.from_state(state, patch.positions, patch.scaling)
    other = load_tiny(folder)
    patch.apply(backbone)
    again.apply(other)
    for name, module in backbone.targets.items():
        assert torch.equal(module.weight, other.targets[name].weight)


def test_handoff_on_a_real_checkpoint(assets: Path) -> None:
    """MiniLM after one small step: Lanczos on 384 x 384 and 1536 x 384."""
    folder = assets / "models" / "minilm-l6-h384-uncased"
    model = ModelConfig(name=str(folder))
    backbone = load_backbone(model, 3, 0, "query,intermediate.dense")
    examples = make_examples(4)
    sparse = SparseAdapter(0.01, "unstructured", 5)
    sparse.attach(backbone)
    recipe = RecipeConfig(batch_size=4, lr=1e-3)
    train(backbone, sparse, examples, recipe, (0, 1, 0))
    learned = logits(backbone.model, examples)
    done = hand_over(backbone, sparse, sparse.state(), config_of("residual"))
    assert len(done.energies) == 12
    assert all(0.005 < energy < 0.5 for energy in done.energies.values())
    enter(backbone, done)
    torch.testing.assert_close(
        logits(backbone.model, examples), learned, rtol=0, atol=1e-5
    )
