"""How a client's examples become batches, and what each weighs in its training."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slora_flwr.adapters import HeadAdapter
from slora_flwr.backbone.load import Backbone
from slora_flwr.common.tensors import State
from slora_flwr.config import RecipeConfig
from slora_flwr.data.examples import Examples
from slora_flwr.training.loop import train
from tests.support.tiny import make_examples


def of_lengths(lengths: list[int]) -> Examples:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.full(offsets[-1], 7, dtype=np.int32)
    return Examples(tokens, offsets, np.zeros(len(lengths), dtype=np.int64), pad=0)


def padded(examples: Examples, batches: list[np.ndarray]) -> int:
    return sum(len(rows) * int(examples.lengths[rows].max()) for rows in batches)


@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=400),
    st.integers(1, 33),
    st.integers(0, 2**32),
)
@settings(deadline=None)
def test_an_epoch_has_each_example_once_in_batches_of_one_size(
    lengths: list[int], batch_size: int, seed: int
) -> None:
    batches = list(of_lengths(lengths).shuffled(batch_size, np.random.Philox(key=seed)))
    rows = np.concatenate(batches)
    sizes = {len(batch) for batch in batches}
    assert sorted(rows.tolist()) == list(range(len(lengths)))
    assert len(batches) == math.ceil(len(lengths) / batch_size)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


def test_a_small_clients_batches_differ_from_epoch_to_epoch() -> None:
    examples = of_lengths(list(range(1, 101)))
    stream = np.random.Philox(key=3)
    epochs = [list(examples.shuffled(16, stream)) for _ in range(200)]
    seen = {tuple(sorted(rows.tolist())) for epoch in epochs for rows in epoch}
    assert len(seen) > 1000  # of 1,400


def test_padding_is_far_below_that_of_a_random_order() -> None:
    draw = np.random.default_rng(0)
    for count in (100, 1000):
        lengths = np.clip(draw.lognormal(3.3, 0.6, count), 4, 64).astype(int)
        examples = of_lengths(lengths.tolist())
        ours = padded(examples, list(examples.shuffled(16, np.random.Philox(key=1))))
        random = padded(examples, np.array_split(draw.permutation(count), count // 16))
        least = int(lengths.sum())
        assert ours - least < 0.25 * (random - least)


def test_each_example_weighs_the_same_in_an_epoch(backbone: Backbone) -> None:
    """By hand: so small a rate changes weights by the sum of all gradients alone.

    Of 17 examples and batches of up to 16, two steps use each example once, each with
    the weight 2 / 17.
    """
    draw = np.random.default_rng(0)
    lengths = list(range(4, 21))
    examples = of_lengths(lengths)
    examples.tokens[:] = draw.integers(5, 120, size=len(examples.tokens))
    examples.labels[:] = np.arange(17) % 3
    adapter = HeadAdapter()
    adapter.attach(backbone)
    model = backbone.model.eval()
    model.train = lambda mode=True: model  # the same dropout for each: none
    try:
        expected: State = {}
        for row in range(17):
            ids, mask, labels = examples.batch(np.array([row]))
            output = model(input_ids=ids, attention_mask=mask).logits
            torch.nn.functional.cross_entropy(output, labels).backward()
        for name, parameter in backbone.head.items():
            assert parameter.grad is not None
            expected[name] = parameter.grad * (2 / 17)
            parameter.grad = None
        before = adapter.state()
        recipe = RecipeConfig(batch_size=16, optimizer="sgd", lr=1e-3)
        train(backbone, adapter, examples, recipe, (0, 1, 2))
        after = adapter.state()
    finally:
        del model.train
        adapter.detach()
    for name, gradient in expected.items():
        moved = (before[name] - after[name]) / 1e-3
        largest = float(gradient.abs().max())
        torch.testing.assert_close(moved, gradient, rtol=0, atol=0.02 * largest)


@pytest.mark.parametrize("tokens", [0, 5, 40])
@pytest.mark.parametrize("count", [1, 3, 50])
def test_parts_have_each_row_once_within_the_bound(count: int, tokens: int) -> None:
    examples = make_examples()
    rows = np.arange(3, 20)
    parts = list(examples.parts(rows, count, tokens))
    assert sorted(np.concatenate(parts).tolist()) == rows.tolist()
    assert all(len(part) <= -(-len(rows) // count) for part in parts)
    for part in parts:
        longest = int(examples.lengths[part].max())
        assert not tokens or len(part) == 1 or len(part) * longest <= tokens
    if tokens == 40 and count == 1:
        # One more row would not have fitted.
        for part, after in itertools.pairwise(parts):
            assert (len(part) + 1) * int(examples.lengths[after[0]]) > tokens
    if (count, tokens) == (1, 0):
        assert parts[0] is rows


def test_batches_of_an_evaluation_keep_to_the_bound() -> None:
    examples = make_examples()
    whole = list(examples.in_order_of_length(8))
    assert [len(rows) for rows in whole] == [8, 8, 8]
    small = list(examples.in_order_of_length(8, 40))
    assert np.concatenate(small).tolist() == np.concatenate(whole).tolist()
    assert all(len(r) * int(examples.lengths[r].max()) <= 40 for r in small)
    assert len(small) > 3
