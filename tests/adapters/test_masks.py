"""Masks: the same everywhere, exactly as dense as asked, uniform."""

import hashlib

import numpy as np
import pytest

from slora_flwr.adapters.masks import (
    allocate_densities,
    fingerprint,
    make_mask,
    mask_size,
)
from slora_flwr.common.random import draw_distinct, key
from tests.support.reference import reference_distinct

# A new value here means that old runs, and nodes of another version, have other masks.
GOLDEN_START = [165, 241, 478, 763]
GOLDEN = "7d84b124ee205029834b03db607642d3"


def reference_mask(
    seed: int,
    name: str,
    shape: tuple[int, int],
    count: int,
    server_round: int = 0,
    structure: str = "unstructured",
) -> list[int]:
    text = (
        f"int:{seed}\x1fint:{server_round}\x1fstr:{name}\x1fint:{shape[0]}"
        f"\x1fint:{shape[1]}\x1fstr:{structure}"
    )
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    m, n = shape
    size = {"unstructured": m * n, "rows": m, "columns": n}[structure]
    drawn = reference_distinct(int(digest, 16), count, size)
    if structure == "unstructured":
        return drawn
    of = {"rows": lambda p: p // n, "columns": lambda p: p % n}[structure]
    return [p for p in range(m * n) if of(p) in drawn]


def test_a_mask_never_changes() -> None:
    masks = {
        "encoder.query": make_mask(7, "encoder.query", (384, 1536), 0.01),
        "encoder.out": make_mask(7, "encoder.out", (30, 20), 0.75, server_round=2),
    }
    assert masks["encoder.query"][:4].tolist() == GOLDEN_START
    assert fingerprint(masks) == GOLDEN


@pytest.mark.parametrize(
    ("shape", "density", "count"),
    [
        ((32, 48), 0.01, 15),  # 15.36
        ((48, 32), 0.1, 154),  # 153.6
        ((31, 17), 0.5, 264),  # 263.5, to even
        ((31, 17), 0.9, 474),  # 474.3
        ((20, 30), 1.0, 600),
        ((3, 5), 0.001, 1),  # at least one
    ],
)
def test_mask_is_the_reference_with_exactly_its_density(
    shape: tuple[int, int], density: float, count: int
) -> None:
    mask = make_mask(5, "a.b", shape, density)
    assert mask.dtype == np.int64
    assert mask.tolist() == reference_mask(5, "a.b", shape, count)
    assert len(set(mask.tolist())) == count
    assert (np.diff(mask) > 0).all()


@pytest.mark.parametrize(
    ("structure", "density", "count"),
    [
        ("rows", 0.1, 3),  # 3.1 of 31
        ("rows", 0.9, 28),  # 27.9
        ("columns", 0.1, 2),  # 1.7 of 17
        ("columns", 0.001, 1),  # at least one
        ("columns", 1.0, 17),
    ],
)
def test_structured_masks_are_whole_lines(
    structure: str, density: float, count: int
) -> None:
    mask = make_mask(5, "a.b", (31, 17), density, structure, server_round=4)
    expected = reference_mask(5, "a.b", (31, 17), count, 4, structure)
    assert mask.tolist() == expected
    assert len(mask) == count * (17 if structure == "rows" else 31)
    assert mask_size((31, 17), density, structure) == len(mask)


def test_round_is_part_of_the_reference() -> None:
    mask = make_mask(1, "w", (40, 50), 0.02, server_round=3)
    assert mask.tolist() == reference_mask(1, "w", (40, 50), 40, server_round=3)


def test_words_beyond_the_last_whole_multiple_are_refused() -> None:
    size = 3 * 2**61  # a quarter of all words is refused
    drawn = draw_distinct(np.random.Philox(key=9), 50, size)
    assert drawn.tolist() == reference_distinct(9, 50, size)
    words = np.random.Philox(key=9).random_raw(50).tolist()
    assert any(word >= 2 * size for word in words)


def test_full_mask_is_every_entry() -> None:
    np.testing.assert_array_equal(make_mask(0, "w", (7, 9), 1.0), np.arange(63))


def test_masks_differ_by_seed_name_round_and_orientation() -> None:
    masks = [
        make_mask(0, "a", (32, 48), 0.1),
        make_mask(1, "a", (32, 48), 0.1),
        make_mask(0, "b", (32, 48), 0.1),
        make_mask(0, "a", (48, 32), 0.1),
        make_mask(0, "a", (32, 48), 0.1, server_round=1),
        make_mask(0, "a", (32, 48), 0.1, "rows"),
        make_mask(0, "a", (32, 48), 0.1, "columns"),
    ]
    assert len({mask.tobytes() for mask in masks}) == len(masks)


def test_parts_of_a_key_are_told_apart() -> None:
    keys = [key("a", "b"), key("ab"), key("a", "b", ""), key(1), key("1"), key(1, 2)]
    assert len(set(keys)) == len(keys)
    assert all(0 <= k < 2**128 for k in keys)


@pytest.mark.parametrize("density", [0.05, 0.8])
def test_every_entry_is_equally_likely(density: float) -> None:
    draws, size = 4000, 60
    counts = np.zeros(size)
    for seed in range(draws):
        counts[make_mask(seed, "w", (6, 10), density)] += 1
    expected = density * draws
    variance = draws * density * (1 - density)
    # Entries of one mask exclude each other, hence (size - 1) / size.
    chi_square = ((counts - expected) ** 2).sum() / variance * (size - 1) / size
    assert counts.sum() == round(density * size) * draws
    assert 25 < chi_square < 105  # 59 degrees of freedom: outside by chance 1 in 10^4


def test_pairs_of_entries_are_independent_of_distance() -> None:
    """Neighbours are chosen together as often as any other two entries."""
    draws, size, count = 4000, 60, 6
    together = 0
    for seed in range(draws):
        together += int((np.diff(make_mask(seed, "w", (6, 10), 0.1)) == 1).sum())
    expected = draws * (size - 1) * count * (count - 1) / (size * (size - 1))
    assert abs(together - expected) < 5 * np.sqrt(expected)


def test_fingerprint_sees_names_positions_and_order() -> None:
    one, two = np.array([1, 2]), np.array([1, 3])
    prints = [
        fingerprint({"a": one, "b": two}),
        fingerprint({"b": two, "a": one}),
        fingerprint({"a": two, "b": two}),
        fingerprint({"a": one, "c": two}),
        fingerprint({"a": np.array([1, 2, 1]), "b": np.array([3])}),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint({"a": one.astype(np.int32)}) == fingerprint({"a": one})


def test_unknown_structure_is_refused() -> None:
    with pytest.raises(ValueError, match="unstructured, rows, columns"):
        make_mask(0, "w", (4, 4), 0.5, "diagonal")


# --- densities by budget

SHAPES = {"square": (40, 40), "wide": (20, 60), "small": (4, 5)}


def entries(densities: dict[str, float]) -> dict[str, float]:
    return {
        name: d * SHAPES[name][0] * SHAPES[name][1] for name, d in densities.items()
    }


def test_a_uniform_budget_is_the_papers() -> None:
    assert allocate_densities(SHAPES, 0.1, "uniform") == pytest.approx(
        dict.fromkeys(SHAPES, 0.1)
    )


def test_an_erdos_renyi_budget_goes_by_sides() -> None:
    # 282 of 2820 entries in parts of 80, 80 and 9; 15.02 entries of the 20.
    found = entries(allocate_densities(SHAPES, 0.1, "erdos-renyi"))
    parts = {"square": 80, "wide": 80, "small": 9}
    assert found == pytest.approx({n: 282 * p / 169 for n, p in parts.items()})


def test_what_a_full_matrix_cannot_take_goes_to_the_others() -> None:
    # 94 each, of which the small one takes 20, which leaves 131 for each other one.
    found = entries(allocate_densities(SHAPES, 0.1, "equal"))
    assert found == pytest.approx({"square": 131.0, "wide": 131.0, "small": 20.0})


@pytest.mark.parametrize("budget", ["uniform", "erdos-renyi", "equal"])
def test_a_full_budget_is_everything(budget: str) -> None:
    assert allocate_densities(SHAPES, 1.0, budget) == dict.fromkeys(SHAPES, 1.0)
