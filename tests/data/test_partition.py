"""Partitions: cover, determinism, skew, limits."""

import itertools
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import digamma

from slora_flwr.data import kept
from slora_flwr.data import partition as room
from slora_flwr.data.partition import Partition, PartitionError, make_partition

Labels = np.ndarray

LABELS = np.arange(11_314) % 20  # the size of 20newsgroups, all classes alike
UNEVEN = np.repeat(np.arange(20), [7100, *range(1950, 50, -100)])
DISJOINT = ["iid", "dirichlet", "pathological"]


@pytest.fixture(autouse=True)
def anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each partition made anew, not read from the cache."""
    monkeypatch.setenv("SLORA_HOME", str(tmp_path))
    numbers = itertools.count()

    def keep(name: str, make: Callable[[], bytes]) -> bytes:
        return kept.keep(name, make, tmp_path / str(next(numbers)))

    monkeypatch.setattr(room, "keep", keep)


def make(labels: Labels = LABELS, num_classes: int = 20, **changes: Any) -> Partition:
    settings: dict[str, Any] = {
        "count": 100,
        "partitioner": "dirichlet",
        "alpha": 0.1,
        "classes": 2,
        "examples": 50,
        "min_examples": 1,
        "seed": 0,
    }
    return make_partition(labels, num_classes, **(settings | changes))


def clients(partition: Partition) -> list[np.ndarray]:
    return [partition.indices(i) for i in range(len(partition.sizes))]


def mean_entropy(partition: Partition, labels: Labels = LABELS) -> float:
    """Mean over clients of the entropy of their labels, in nats."""
    total = 0.0
    for rows in clients(partition):
        p = np.bincount(labels[rows]) / len(rows)
        total -= (p[p > 0] * np.log(p[p > 0])).sum()
    return total / len(partition.sizes)


@pytest.mark.parametrize("labels", [LABELS, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("partitioner", DISJOINT)
@pytest.mark.parametrize("alpha", [0.01, 0.5])
def test_every_row_has_exactly_one_owner(
    partitioner: str, labels: Labels, alpha: float
) -> None:
    partition = make(labels, partitioner=partitioner, alpha=alpha)
    rows = clients(partition)
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(len(labels)))
    assert partition.sizes.dtype == np.int64
    assert partition.sizes.tolist() == [len(r) for r in rows]
    assert all((np.diff(r) > 0).all() for r in rows)
    assert partition.sizes.min() >= 1


@settings(max_examples=40)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    count=st.integers(1, 12),
    min_examples=st.integers(1, 6),
    alpha=st.sampled_from([1e-6, 0.01, 1, 1e6]),
    seed=st.integers(-5, 5),
)
def test_dirichlet_succeeds_whenever_the_rows_suffice(
    labels: list[int], count: int, min_examples: int, alpha: float, seed: int
) -> None:
    ask = {"count": count, "min_examples": min_examples, "alpha": alpha, "seed": seed}
    if count * min_examples > len(labels):
        with pytest.raises(PartitionError):
            make(np.array(labels), 5, **ask)
        return
    partition = make(np.array(labels), 5, **ask)
    assert partition.sizes.min() >= min_examples
    rows = np.sort(np.concatenate(clients(partition)))
    np.testing.assert_array_equal(rows, np.arange(len(labels)))


@pytest.mark.parametrize("seed", range(5))
def test_alpha_001_with_100_clients_is_topped_up(seed: int) -> None:
    partition = make(alpha=0.01, seed=seed)
    assert partition.sizes.min() == 1
    assert partition.sizes.max() > 400  # the mean is 113: still very uneven
    assert 0 < partition.moved <= 40  # 23 empty clients in the mean draw
    assert make(alpha=0.5, seed=seed).moved == 0


def test_a_fresh_process_makes_the_same_partition() -> None:
    ask = """
import sys, zlib, numpy as np
from slora_flwr.data.partition import make_partition
for name in ("virtual", "iid", "dirichlet", "pathological"):
    p = make_partition(np.arange(2000) % 20, 20, count=30, partitioner=name, alpha=0.01,
                       classes=2, examples=50, min_examples=1, seed=7)
    crc = zlib.crc32(np.concatenate([p.indices(i) for i in range(30)]).tobytes())
    print(name, crc, "datasets" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, check=True
    )
    for line in done.stdout.splitlines():
        name, crc, heavy = line.split()
        ask_here: dict[str, Any] = {"count": 30, "partitioner": name, "alpha": 0.01}
        same, other = (
            zlib.crc32(
                np.concatenate(
                    clients(make(LABELS[:2000], seed=s, **ask_here))
                ).tobytes()
            )
            for s in (7, 8)
        )
        assert int(crc) == same != other
        assert heavy == str(name != "virtual")  # clients pay for slow imports
    assert len(done.stdout.splitlines()) == 4


@pytest.mark.parametrize("partitioner", ["dirichlet", "virtual"])
def test_skew_grows_as_alpha_falls(partitioner: str) -> None:
    found = [
        mean_entropy(make(partitioner=partitioner, alpha=alpha))
        for alpha in (100, 0.5, 0.1, 0.01)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.9 * np.log(20)
    assert found[-1] < 0.5


@pytest.mark.parametrize("alpha", [0.05, 0.5, 5])
def test_virtual_mixture_has_the_entropy_of_its_dirichlet(alpha: float) -> None:
    # E[H(q)] = psi(A + 1) - sum_k a_k / A psi(a_k + 1), A = sum_k a_k
    p = np.bincount(UNEVEN) / len(UNEVEN)
    a = alpha * 20 * p
    expected = digamma(a.sum() + 1) - (p * digamma(a + 1)).sum()
    partition = make(
        UNEVEN, partitioner="virtual", alpha=alpha, examples=2000, count=400
    )
    assert mean_entropy(partition, UNEVEN) == pytest.approx(expected, abs=0.08)
    drawn = np.bincount(UNEVEN[np.concatenate(clients(partition))]) / (400 * 2000)
    np.testing.assert_allclose(drawn, p, atol=0.06)  # clients average to the data


def test_iid_shares_are_equal_and_shuffled() -> None:
    partition = make(np.sort(LABELS), partitioner="iid")
    assert set(partition.sizes) == {113, 114}
    assert mean_entropy(partition, np.sort(LABELS)) > 0.9 * np.log(20)


@pytest.mark.parametrize("classes", [1, 2, 5, 20])
def test_pathological_clients_hold_exactly_their_classes(classes: int) -> None:
    for rows in clients(make(UNEVEN, partitioner="pathological", classes=classes)):
        assert len(set(UNEVEN[rows])) == classes


def test_virtual_clients_depend_on_nothing_but_their_id() -> None:
    few = make(partitioner="virtual", count=10)
    many = make(partitioner="virtual", count=1_000_000)
    expected = clients(few)
    for client in (9, 3, 3, 0):
        np.testing.assert_array_equal(many.indices(client), expected[client])
    assert many.sizes.shape == (1_000_000,)
    assert many.sizes.strides == (0,)
    assert set(many.sizes[:10]) == {50}
    assert len({rows.tobytes() for rows in expected}) == 10
    assert all(len(rows) == 50 for rows in expected)


def test_virtual_repeats_rows_only_where_a_label_runs_out() -> None:
    labels = np.repeat([0, 2], [300, 7])  # class 1 has no rows
    partition = make(
        labels, 3, partitioner="virtual", count=200, alpha=0.01, examples=40
    )
    short = 0
    for rows in clients(partition):
        times = np.bincount(rows, minlength=307)
        assert times.sum() == 40
        assert times[:300].max() <= 1
        assert np.ptp(times[300:]) <= 1
        short += int(times[300:].max() > 1)
    assert short > 0


def test_virtual_keeps_nothing_per_client() -> None:
    partition = make(partitioner="virtual", count=1_000_000)
    assert partition.sizes.shape == (1_000_000,)
    assert partition.sizes.strides == (0,)
    assert len(partition.indices(999_999)) == 50


@pytest.mark.parametrize("partitioner", ["iid", "virtual"])
@pytest.mark.parametrize("client", [-1, 100])
def test_unknown_clients_are_refused(partitioner: str, client: int) -> None:
    with pytest.raises(IndexError, match=f"client {client}: must be from 0 to 99"):
        make(partitioner=partitioner).indices(client)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partitioner": "shard"}, 'clients.partitioner = "shard": must be one of "i'),
        ({"count": 0}, "clients.count = 0: must be at least 1"),
        ({"min_examples": 0}, "clients.min-examples = 0: must be at least 1"),
        ({"alpha": 0.0}, "clients.alpha = 0.0: must be above 0"),
        ({"alpha": -1.0}, "clients.alpha = -1.0: must be above 0"),
        ({"alpha": float("nan")}, "clients.alpha = nan: must be above 0"),
        ({"alpha": float("inf"), "partitioner": "virtual"}, "clients.alpha = inf"),
        ({"count": 11_315}, 'at most 11314, the number of training rows; .*"virtual"'),
        ({"min_examples": 114}, "need 11400 of 11314 training rows; .* at most 113"),
        ({"partitioner": "pathological", "classes": 21}, "clients.classes = 21: .* 20"),
        ({"partitioner": "pathological", "classes": 0}, "clients.classes = 0: must be"),
        (
            {"partitioner": "pathological", "min_examples": 113},
            r"clients.min-examples = 113: client \d+ gets \d+ with 2 labels",
        ),
        (
            {"partitioner": "pathological", "count": 10_000},
            "clients.classes = 2: a label has fewer rows .* clients.count = 10000",
        ),
        (
            {"partitioner": "virtual", "examples": 0},
            r"clients.examples = 0: must be from 1 \(clients.min-examples\) to 11314",
        ),
        ({"partitioner": "virtual", "examples": 11_315}, "clients.examples = 11315"),
        ({"labels": np.array([], int)}, "data.train has no rows"),
        ({"labels": np.array([0, 20])}, "run from 0 to 20, .* ids from 0 to 19"),
        ({"labels": np.array([0.5])}, "one integer per row, got float64"),
    ],
)
def test_impossible_partitions_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PartitionError, match=message):
        make(**changes)


def test_a_partition_is_made_once_and_then_read_without_the_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "keep", kept.keep)
    first = make()

    def refuse(*_: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(room, "_divide", refuse)
    for one, other in zip(clients(first), clients(make()), strict=True):
        assert np.array_equal(one, other)
    assert make().moved == first.moved
    changes: list[dict[str, Any]] = [
        {"seed": 1},
        {"alpha": 0.2},
        {"count": 99},
        {"min_examples": 2},
        {"partitioner": "iid"},
        {"labels": LABELS[:-1]},
        {"partitioner": "pathological", "classes": 3},
    ]
    for change in changes:
        with pytest.raises(AssertionError, match="made again"):
            make(**change)


def test_a_bit_that_has_flipped_on_the_disk_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "keep", kept.keep)
    first = clients(make(partitioner="iid"))
    (path,) = (tmp_path / "cache").iterdir()
    content = bytearray(path.read_bytes())
    content[-16] ^= 1
    path.write_bytes(content)
    for one, other in zip(first, clients(make(partitioner="iid")), strict=True):
        assert np.array_equal(one, other)
