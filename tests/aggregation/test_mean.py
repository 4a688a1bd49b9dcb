"""Aggregation: weights, order and grouping, and the server optimisers."""

import math
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from slora_flwr.aggregation.mean import FoldError, Mean
from slora_flwr.aggregation.server_optimizer import DEFAULT_RATES, ServerOptimizer
from slora_flwr.aggregation.stack import Stack
from slora_flwr.config import list_keys
from slora_flwr.wire import state_channel
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.packing import PayloadError
from slora_flwr.wire.state_channel import SUMS, Upload, write_updates

Updates = list[tuple[list[float], int]]

APART = state_channel.UPDATES

VALUES = st.floats(-1e3, 1e3, width=32)
WEIGHTS = st.integers(1, 10_000)
UPDATES = st.lists(
    st.tuples(st.lists(VALUES, min_size=3, max_size=3), WEIGHTS),
    min_size=1,
    max_size=12,
)


def state(*values: float) -> dict[str, torch.Tensor]:
    return {"x": torch.tensor(values, dtype=torch.float32)}


def fold(updates: Updates) -> Mean:
    mean = Mean()
    for values, weight in updates:
        mean.add(state(*values), weight)
    return mean


def test_weights_count_as_examples() -> None:
    mean = Mean()
    mean.add({"x": torch.tensor([1.0, 2.0]), "y": torch.tensor(8.0)}, 1)
    mean.add({"x": torch.tensor([5.0, -6.0]), "y": torch.tensor(0.0)}, 3)
    result = mean.result()
    # (1·1 + 3·5) / 4, (1·2 - 3·6) / 4 and (1·8 + 3·0) / 4
    assert result["x"].tolist() == [4.0, -4.0]
    assert result["y"].item() == 2.0
    assert mean.weight == 4
    assert result["x"].dtype == torch.float32


class Passes(TorchDispatchMode):
    """Counts the values that all operations write."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        # A view writes nothing.
        if isinstance(found, torch.Tensor) and not func.is_view:
            self.values += found.numel()
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folding_passes_over_the_values_a_few_times(dtype: torch.dtype) -> None:
    size = 100_000
    update = {"x": torch.linspace(-1, 1, size, dtype=dtype)}
    node, server = Mean(), Mean()
    node.add(update, 3)
    server.merge(node.sums, node.weight)
    kept = node.sums["x"].data_ptr(), server.sums["x"].data_ptr()
    with Passes() as adding:
        node.add(update, 5)
    with Passes() as merging:
        server.merge(node.sums, node.weight)
    # To float64, scaled, rounded, to int64, added; and two values for the range.
    assert adding.values <= 5 * size + 2
    assert merging.values <= size + 2
    assert (node.sums["x"].data_ptr(), server.sums["x"].data_ptr()) == kept
    assert server.sums["x"][-1].item() == (3 + 8) * 2**30


def test_an_update_is_not_changed_by_folding_it() -> None:
    update = state(1.0, 2.0)
    mean = Mean()
    mean.add(update, 2)
    mean.add(state(1.0, 1.0), 2)
    mean.result()["x"].zero_()
    assert update["x"].tolist() == [1.0, 2.0]
    assert mean.result()["x"].tolist() == [1.0, 1.5]
    wide = {"x": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    Mean().add(wide, 2)
    assert wide["x"].tolist() == [1.0, 2.0]


def test_sums_that_were_merged_are_not_changed() -> None:
    node, server = fold([([1.0, 2.0, 3.0], 2)]), Mean()
    before = node.sums["x"].clone()
    server.merge(node.sums, node.weight)
    server.add(state(5.0, 5.0, 5.0), 1)
    assert torch.equal(node.sums["x"], before)


@settings(max_examples=80)
@given(updates=UPDATES)
def test_the_fold_is_the_weighted_mean(updates: Updates) -> None:
    weights = [weight for _, weight in updates]
    expected = [
        math.fsum(values[i] * w for values, w in updates) / sum(weights)
        for i in range(3)
    ]
    result = fold(updates).result()["x"].numpy()
    # Float32, and half of 2^-30 lost for each update.
    np.testing.assert_allclose(result, expected, rtol=1e-7, atol=1e-9)


@settings(max_examples=80)
@given(
    updates=UPDATES,
    order=st.randoms(use_true_random=False),
    cuts=st.lists(st.integers(0, 12), max_size=4),
)
def test_order_and_grouping_do_not_matter(
    updates: Updates, order: Random, cuts: list[int]
) -> None:
    expected = fold(updates)
    shuffled = list(updates)
    order.shuffle(shuffled)
    server = Mean()
    edges = sorted({0, len(updates), *(cut for cut in cuts if cut < len(updates))})
    for start, stop in pairwise(edges):
        node = fold(shuffled[start:stop])
        server.merge(node.sums, node.weight)
    assert server.weight == sum(weight for _, weight in updates)
    assert torch.equal(server.sums["x"], expected.sums["x"])
    assert torch.equal(server.result()["x"], expected.result()["x"])


def test_a_thousand_small_updates_lose_no_bits() -> None:
    mean = Mean()
    mean.add(state(2.0**20), 1)
    for _ in range(1024):
        mean.add(state(2.0**-8), 1)  # float32 would drop each of them
    assert mean.result()["x"].item() == np.float32((2.0**20 + 4) / 1025)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2.0**32, -1e38])
def test_what_cannot_be_summed_is_refused_and_changes_nothing(value: float) -> None:
    mean = fold([([1.0, 2.0, 3.0], 4)])
    with pytest.raises(FoldError, match="the update of x is not finite or too large"):
        mean.add(state(0.0, value, 0.0), 1)
    assert mean.weight == 4
    assert mean.result()["x"].tolist() == [1.0, 2.0, 3.0]


def test_sums_that_would_overflow_are_refused() -> None:
    half = {"x": torch.tensor([2**61])}
    mean = Mean()
    mean.merge(half, 1)
    with pytest.raises(FoldError):
        mean.merge(half, 1)
    with pytest.raises(FoldError):
        mean.add(state(2.0**31), 1)
    with pytest.raises(FoldError):
        mean.merge({"x": torch.tensor([-(2**63)])}, 1)
    assert (mean.weight, mean.sums["x"].tolist()) == (1, [2**61])


def test_sums_that_cancel_are_not_refused() -> None:
    mean = Mean()
    for sign in (1, -1, 1, -1, -1):
        mean.merge({"x": torch.tensor([sign * (2**62 - 1)])}, 1)
    assert mean.sums["x"].tolist() == [1 - 2**62]
    with pytest.raises(FoldError):
        mean.add(state(-(2.0**-30)), 1)
    mean.add(state(2.0**-30), 1)
    assert (mean.weight, mean.sums["x"].tolist()) == (6, [2 - 2**62])


def test_a_refused_tensor_leaves_the_others_as_they_were() -> None:
    mean = Mean()
    mean.add({"x": torch.tensor(1.0), "y": torch.tensor(2.0)}, 1)
    with pytest.raises(FoldError, match="the update of y is not finite or too large"):
        mean.add({"x": torch.tensor(1.0), "y": torch.tensor(math.nan)}, 1)
    with pytest.raises(FoldError, match="the update of y is not finite or too large"):
        mean.merge({"x": torch.tensor(1), "y": torch.tensor(2**62)}, 1)
    assert [int(t) for t in mean.sums.values()] == [2**30, 2**31]
    assert mean.weight == 1


def test_tensors_may_be_empty() -> None:
    mean = Mean()
    mean.add({"x": torch.zeros(0, 3)}, 1)
    mean.merge(mean.sums, 1)
    assert mean.result()["x"].shape == (0, 3)


def coded(codec: Codec, number: int) -> Upload:
    """Return an encoded update of 1000 values, drawn by a number."""
    drawn = torch.Generator().manual_seed(number)
    array = codec.encode({"x": 1e-2 * torch.randn(1000, generator=drawn)})
    return Upload(array, codec.decode(array, {"x": (1000,)}))


@pytest.mark.parametrize(
    ("codec", "clients", "kind"),
    [
        # 32 bits a client, against about 35 of a sum.
        (Codec(), 2, SUMS),
        # 16 bits a client, against 6 less of a sum: all are multiples of 2^-24.
        (Codec("float16"), 2, SUMS),
        # 8.25 and 4.25 bits a client.
        (Codec("int8"), 4, APART),
        (Codec("int8"), 5, SUMS),
        (Codec("int4"), 7, APART),
        (Codec("int4"), 20, SUMS),
    ],
    ids=str,
)
def test_a_node_sends_sums_or_coded_updates_whichever_is_less(
    codec: Codec, clients: int, kind: str
) -> None:
    node, alone, server = Mean(codec=codec), Mean(codec=codec), Mean(codec=codec)
    ids, weights = [*range(clients)], [100 + n for n in range(clients)]
    for number, weight in zip(ids, weights, strict=True):
        upload = coded(codec, number)
        node.add_upload(upload, weight, number)
        alone.take(upload.array, {"x": (1000,)}, [number], [weight])
    array = node.packed()
    assert array.stype == kind
    apart = sum(8 + len(coded(codec, n).array.data) for n in ids)
    assert (len(array.data) < apart) if kind == SUMS else (len(array.data) == apart)
    server.take(array, {"x": (1000,)}, ids, weights)
    assert server.sums["x"].equal(alone.sums["x"])
    assert server.weight == alone.weight == sum(weights)


def test_a_node_of_many_clients_keeps_no_more_than_their_sum() -> None:
    codec = Codec("int8")
    upload = coded(codec, 1)
    node = Mean(codec=codec)
    for client in range(3):
        node.add_upload(upload, 1, client)
    assert len(node._arrays) == 3
    for client in range(3, 40):
        node.add_upload(upload, 1, client)
    assert not node._arrays
    assert node.packed().stype == SUMS


def test_coded_updates_are_checked_one_by_one_and_all_or_none_is_added() -> None:
    codec = Codec("int8")
    server = Mean(codec=codec, clip_norm=1.0)
    long = codec.encode({"x": torch.ones(1000)})
    array = write_updates([coded(codec, 1).array, long])
    with pytest.raises(FoldError, match=r"server\.clip-norm is 1"):
        server.take(array, {"x": (1000,)}, [3, 4], [5, 5])
    assert (server.sums, server.weight, server.sizes) == ({}, 0, [])


def test_where_each_update_is_needed_sums_are_refused() -> None:
    node = Mean()
    node.add({"x": torch.ones(3)}, 1)
    with pytest.raises(PayloadError):
        Stack().take(node.packed(), {"x": (3,)}, [3, 4], [1, 1])


def run(name: str, lr: float, updates: list[float], start: float = 1.0) -> list[float]:
    optimizer, now, seen = ServerOptimizer(name, lr), state(start), []
    for update in updates:
        now = optimizer.step(now, state(update))
        seen.append(now["x"].item())
    return seen


def test_none_adds_the_mean() -> None:
    assert run("none", 1.0, [0.5, -2.0]) == [1.5, -0.5]


@pytest.mark.parametrize("name", ["none", "fedavgm", "fedadam"])
def test_rate_0_is_the_optimizers_own(name: str) -> None:
    rate = DEFAULT_RATES[name]
    assert run(name, 0.0, [0.5, -2.0]) == run(name, rate, [0.5, -2.0])
    [told] = [key.help for key in list_keys() if key.name == "server.lr"]
    assert f"{rate} for `{name}`" in told


def test_none_adds_lr_times_the_mean() -> None:
    assert run("none", 0.5, [0.5, -2.0]) == [1.25, 0.25]


def test_fedavgm_accumulates_with_momentum() -> None:
    # v = 0.9 v + u and x = x + lr v: v is 1, 2.9, 1.61 and x is 1.1, 1.39, 1.551.
    found = run("fedavgm", 0.1, [1.0, 2.0, -1.0])
    assert found == pytest.approx([1.1, 1.39, 1.551], abs=1e-6)


def test_fedadam_takes_the_papers_steps() -> None:
    # m = 0.9 m + 0.1 u, v = 0.99 v + 0.01 u², both over 1 - beta^t, and
    # x = x + lr m / (sqrt(v) + 1e-3).
    x, m, v = 1.0, 0.0, 0.0
    expected = []
    for t, u in enumerate([0.5, -0.25, 0.125], start=1):
        m, v = 0.9 * m + 0.1 * u, 0.99 * v + 0.01 * u**2
        x += 0.1 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.99**t)) + 1e-3)
        expected.append(x)
    # The first step by hand: 0.1 · 0.5 / 0.501.
    assert expected[0] == pytest.approx(1.0998004)
    found = run("fedadam", 0.1, [0.5, -0.25, 0.125])
    assert found == pytest.approx(expected, abs=1e-6)


def test_fedadam_stays_small_where_updates_are_below_tau() -> None:
    [found] = run("fedadam", 1.0, [1e-6], start=0.0)
    assert found == pytest.approx(1e-6 / (1e-6 + 1e-3), rel=1e-4)


@pytest.mark.parametrize("name", ["none", "fedavgm", "fedadam"])
def test_a_step_leaves_what_it_was_given(name: str) -> None:
    optimizer = ServerOptimizer(name, 0.1)
    before, update = state(1.0), state(2.0)
    after = optimizer.step(before, update)
    again = optimizer.step(after, update)
    assert (before["x"].item(), update["x"].item()) == (1.0, 2.0)
    assert after["x"].item() != again["x"].item()
    assert after["x"].data_ptr() != again["x"].data_ptr()


@pytest.mark.parametrize("name", ["fedavgm", "fedadam"])
def test_a_new_optimizer_has_no_memory(name: str) -> None:
    assert run(name, 0.1, [1.0, 1.0])[0] == run(name, 0.1, [1.0])[0]
    steps = run(name, 0.1, [1.0, -0.5])
    fresh = run(name, 0.1, [-0.5], start=steps[0])
    assert steps[1] != pytest.approx(fresh[0], abs=1e-3)
