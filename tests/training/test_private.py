"""DP-SGD on a client: clipping, noise, draws, and what one example can change."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from slora_flwr.adapters import HeadAdapter
from slora_flwr.backbone.load import Backbone
from slora_flwr.config import RecipeConfig
from slora_flwr.training import private
from slora_flwr.training.example_gradients import ExampleGradients
from slora_flwr.training.loop import DeadlineError
from slora_flwr.training.private import LEVELS, GridSum, draw, parts_of, train_privately
from tests.support.tiny import load_tiny, make_examples, no_dropout
from tests.training.test_example_gradients import ADAPTERS, attached

SGD = RecipeConfig(batch_size=8, lr=1.0, optimizer="sgd")
ONES = np.ones(8, dtype=np.int64)
# Statistical bounds fail by chance with less than this probability.
CHANCE = 1e-9


@pytest.fixture
def bert(tiny_models: dict[str, Path]) -> Backbone:
    return no_dropout(load_tiny(tiny_models["bert"]))


def summed(gradients: list[list[float]], bound: float, units: Any = None) -> Tensor:
    """The sum of clipped gradients, in whole numbers of the grid."""
    total = GridSum([torch.zeros(len(gradients[0]))], bound)
    units = ONES[: len(gradients)] if units is None else np.array(units)
    total.add([torch.tensor(gradients)], units)
    return total.sums[0]


def test_clipping_by_hand() -> None:
    """(3, 4) has norm 5 and becomes (0.6, 0.8); (0.3, 0.4) stays as it is."""
    found = summed([[3.0, 4.0], [0.3, 0.4]], 1.0) / LEVELS
    torch.testing.assert_close(
        found, torch.tensor([0.9, 1.2], dtype=torch.float64), rtol=0.0, atol=3e-6
    )


def test_clipping_is_of_all_parameters_together() -> None:
    total = GridSum([torch.zeros(1), torch.zeros(1, 2)], 1.0)
    total.add([torch.tensor([[2.0]]), torch.tensor([[[3.0, 6.0]]])], ONES[:1])
    first, second = (t / LEVELS for t in total.sums)
    assert float(first) == pytest.approx(2 / 7, abs=1e-6)
    assert second.flatten().tolist() == pytest.approx([3 / 7, 6 / 7], abs=1e-6)


def test_a_text_counts_by_its_mean_loss() -> None:
    """A sum over ten tokens is a tenth of itself before it is clipped."""
    found = summed([[5.0, 0.0], [0.0, 5.0]], 1.0, units=[10, 1]) / LEVELS
    assert found.tolist() == pytest.approx([0.5, 1.0], abs=1e-5)


@settings(max_examples=200)
@given(
    st.lists(
        st.lists(st.floats(width=32, allow_nan=True), min_size=5, max_size=5),
        min_size=1,
        max_size=4,
    ),
    st.floats(1e-4, 1e4),
)
def test_no_example_exceeds_the_bound(
    gradients: list[list[float]], bound: float
) -> None:
    """In whole numbers, exactly; and any two sums differ by what differs in them."""
    alone = [summed([gradient], bound) for gradient in gradients]
    for ints in alone:
        assert torch.equal(ints, ints.round())
        assert sum(int(i) ** 2 for i in ints) <= LEVELS**2
    together = summed(gradients, bound)
    assert torch.equal(together, torch.stack(alone).sum(dim=0))
    order = summed(gradients[::-1], bound)
    assert torch.equal(together, order)


@pytest.mark.parametrize("bound", [1e-33, 1e-300])
def test_a_gradient_of_zeros_counts_as_none_whatever_the_bound(bound: float) -> None:
    """The factor that brings it to the grid is beyond float32."""
    assert torch.equal(summed([[0.0, 0.0]], bound), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_counts_as_none(value: float) -> None:
    found = summed([[1.0, value], [0.5, 0.0]], 1.0)
    assert torch.equal(found, summed([[0.5, 0.0]], 1.0))


@pytest.mark.parametrize("name", ADAPTERS)
def test_one_example_changes_a_step_by_at_most_the_bound(
    bert: Backbone, name: str
) -> None:
    """Whatever it is: some have gradients below the bound, others far above."""
    adapter = attached(bert, name)
    gradients = ExampleGradients(bert, adapter, "float32")
    examples = make_examples(6)

    def total(rows: list[int], bound: float) -> list[Tensor]:
        found = GridSum(adapter.parameters(), bound)
        for row in rows:  # as in parts of one
            batch = examples.batch(np.array([row]))
            found.add(gradients.of(batch), examples.units[[row]])
        return found.sums

    for bound in (0.01, 1e3):
        whole = total([*range(6)], bound)
        for left_out in range(6):
            rest = total([row for row in range(6) if row != left_out], bound)
            apart = [float((a - b).norm()) for a, b in zip(whole, rest, strict=True)]
            length = math.hypot(*apart) / LEVELS
            assert 0 < length <= 1
            assert bound > 1 or length > 0.99


# Draws


def test_each_example_is_drawn_by_itself() -> None:
    generator = np.random.default_rng(5)
    count, rate, times = 40, 0.3, 20_000
    drawn = np.zeros((times, count), dtype=bool)
    for row in drawn:
        row[draw(count, rate, generator)] = True
    within = stats.binom.interval(1 - CHANCE / count, times, rate)
    hits = drawn.sum(axis=0)
    assert np.all((hits >= within[0]) & (hits <= within[1]))
    both = int((drawn[:, 0] & drawn[:, 1]).sum())
    low, high = stats.binom.interval(1 - CHANCE, times, rate**2)
    assert low <= both <= high
    sizes = drawn.sum(axis=1)  # a fixed size would have no variance
    expected = times * count * rate * (1 - rate)
    assert sizes.var() * times == pytest.approx(expected, rel=0.1)
    assert len(draw(count, 1.0, generator)) == count


@pytest.mark.parametrize(("accumulate", "most"), [(1, 8), (4, 2), (3, 3)])
def test_parts_are_no_larger_than_those_of_a_usual_batch(
    accumulate: int, most: int
) -> None:
    examples, recipe = make_examples(24), replace(SGD, accumulate=accumulate)
    for size in (0, 1, 7, 8, 9, 24):
        parts = [*parts_of(examples, np.arange(size), recipe)]
        assert all(0 < len(part) <= most for part in parts)
        assert sorted(np.concatenate([*parts, []]).tolist()) == [*range(size)]
    tight = [*parts_of(examples, np.arange(24), replace(recipe, tokens=20))]
    lengths = examples.lengths
    assert all(len(p) == 1 or len(p) * lengths[p].max() <= 20 for p in tight)


# Steps


@pytest.fixture
def no_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "draw", lambda *_: np.arange(0))


@pytest.mark.usefixtures("no_examples")
def test_an_empty_batch_takes_a_step_of_noise(bert: Backbone) -> None:
    """Of standard deviation noise times bound over the expected batch, per step."""
    adapter = ADAPTERS["full"]()
    adapter.attach(bert)
    before = adapter.state()
    recipe = replace(SGD, epochs=2)  # 6 steps of 24 examples
    train_privately(bert, adapter, make_examples(24), recipe, 0.5, 1.5)
    moved = [adapter.state()[n] - t for n, t in before.items()]
    noise = torch.cat([m.flatten() for m in moved]).double().numpy()
    std = 0.5 * 1.5 / 8 * math.sqrt(6)
    count = len(noise)
    assert count > 10_000
    low, high = stats.chi2.interval(1 - CHANCE, count)
    assert low <= float((noise**2).sum()) / std**2 <= high
    assert abs(noise.mean()) <= stats.norm.isf(CHANCE / 2) * std / math.sqrt(count)
    assert stats.kstest(noise / std, "norm").pvalue > CHANCE


def test_noise_is_whole_numbers_whose_last_bits_are_anyone_s_guess() -> None:
    for noise in (1e-3, 1.0, 1e6):
        total = GridSum([torch.zeros(20_000)], 3.0)
        total.perturb(noise, np.random.default_rng(1))
        ints = total.sums[0]
        assert torch.equal(ints, ints.round())
        bits = torch.bincount(ints.long() & 3, minlength=4)
        assert stats.chisquare(bits.numpy()).pvalue > CHANCE


def test_a_step_without_noise_by_hand(
    bert: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are drawn; the head moves by the sum of clipped gradients over the batch."""
    adapter = HeadAdapter()
    adapter.attach(bert)
    examples, bound = make_examples(6), 0.7
    gradients = ExampleGradients(bert, adapter, "float32")
    found = gradients.of(examples.batch(np.arange(6)))
    rows = torch.cat([g.flatten(1) for g in found], dim=1).double()
    rows *= (bound / rows.norm(dim=1, keepdim=True)).clamp(max=1)
    before = torch.cat([t.flatten() for t in adapter.state().values()])
    recipe = replace(SGD, batch_size=6, lr=0.5, accumulate=2)
    train_privately(bert, adapter, examples, recipe, bound, 1e-9)
    after = torch.cat([t.flatten() for t in adapter.state().values()])
    expected = -0.5 * rows.sum(dim=0) / 6
    torch.testing.assert_close((after - before).double(), expected, rtol=0, atol=1e-6)


def test_draws_and_noise_do_not_follow_from_any_seed(bert: Backbone) -> None:
    adapter = attached(bert, "lora")
    start, found = adapter.state(), []
    for generator in (None, None, 4, 4):
        adapter.load(start)
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        chosen = None if generator is None else np.random.default_rng(generator)
        args = (make_examples(24), SGD, 1.0, 1.0)
        train_privately(bert, adapter, *args, generator=chosen)
        found.append(torch.cat([t.flatten() for t in adapter.state().values()]))
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_recipes_hold(bert: Backbone, optimizer: str) -> None:
    """Weight decay and prox need no data; steps are bounded as without privacy."""
    adapter = attached(bert, "lora")
    steps: list[int] = []

    def counting(*given: Any) -> Any:
        steps.append(1)
        return draw(*given)

    recipe = replace(SGD, optimizer=optimizer, lr=1e-3, weight_decay=1.0, prox=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(private, "draw", counting)
        train_privately(bert, adapter, make_examples(20), recipe, 1.0, 1.0)
        assert len(steps) == 3
        recipe = replace(recipe, epochs=5, steps=4)
        train_privately(bert, adapter, make_examples(20), recipe, 1.0, 1.0)
    assert len(steps) == 7
    assert all(bool(t.isfinite().all()) for t in adapter.state().values())


def test_a_deadline_ends_it(bert: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = attached(bert, "head")
    times: Iterator[float] = iter([0.0, 0.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(private.time, "monotonic", lambda: next(times))
    recipe = replace(SGD, batch_size=24, epochs=3)
    with pytest.raises(DeadlineError):
        train_privately(bert, adapter, make_examples(24), recipe, 1.0, 1.0, until=1.0)
