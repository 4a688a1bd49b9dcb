"""Sums of masked numbers are the plain sums, whoever drops out, down to a threshold."""

from dataclasses import replace
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slora_flwr.secure.errors import SecureError
from slora_flwr.secure.graph import COMPLETE, degree, link
from slora_flwr.secure.keys import PrivateKeys
from slora_flwr.secure.member import Member
from slora_flwr.secure.ring import Ring
from slora_flwr.secure.tally import Tally
from slora_flwr.secure.terms import Terms
from tests.support.secure import Held, draw


def assert_is_plain_sum(held: Held, without: set[int]) -> None:
    there = [i for i in range(len(held.values)) if i not in without]
    values, figures = held.tally.open()
    np.testing.assert_array_equal(values, held.values[there].sum(axis=0))
    np.testing.assert_array_equal(figures, held.figures[there].sum(axis=0))


@pytest.mark.parametrize("bits", [16, 24, 32])
@pytest.mark.parametrize("count", [2, 3, 10, 100])
def test_it_is_the_plain_sum(count: int, bits: int) -> None:
    # 16 bits are just enough for a hundred numbers of up to 327.
    most = 2 ** (bits - 1) // count - 1
    held = replace(draw(count, 50, bits, most), ring=Ring(bits))
    assert_is_plain_sum(held.share().mask().tell(), set())


def test_it_is_the_plain_sum_of_a_thousand() -> None:
    held = draw(1000, 5, most=32)
    held = replace(held, colluding=0.01)
    assert len(held.near[0]) < 40  # so that keys and shares are few
    held.share({1, 500}).mask({2, 77, 900}).tell({3, 4})
    assert_is_plain_sum(held, {1, 500, 2, 77, 900})


@given(data=st.data())
@settings(max_examples=40)
def test_whoever_drops_out(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 9))
    threshold = data.draw(st.sampled_from([0.5, 0.66, 0.8]))
    held = replace(draw(count, 3, count), threshold=threshold)
    stages = [data.draw(st.sets(st.integers(0, count - 1))) for _ in range(3)]
    unshared, unmasked, untold = stages
    masked = count - len(unshared | unmasked)
    needed = int(threshold * count) + 1
    # All hold shares of all, so these numbers decide.
    enough = count - len(unshared) >= needed and masked >= needed
    if not enough:
        with pytest.raises(SecureError, match=f"needed: ({needed}|2 at least)"):
            held.share(unshared).mask(unmasked)
        return
    held.share(unshared).mask(unmasked).tell(untold)
    if masked - len(untold - unshared - unmasked) < needed:
        with pytest.raises(SecureError, match=f"needed: {needed}"):
            held.tally.open()
        return
    assert_is_plain_sum(held, unshared | unmasked)


def test_below_the_threshold_nobody_tells_anything() -> None:
    held = draw(4, 3).share()
    with pytest.raises(SecureError, match=r"2 of the 4 members .* needed: 3"):
        held.mask({0, 1})
    for i in held.tally.alive:
        with pytest.raises(SecureError, match="2 of its holders"):
            held.members[i].tell(*held.tally.asks(i))


def test_who_shared_with_too_few_is_left_out_before_training() -> None:
    """By hand: three of member 0's four holders are needed, and two shared."""
    near = [[1, 2, 3], [0], [0], [0, 4, 5], [3, 5], [3, 4]]
    members = [PrivateKeys.generate().public for _ in near]
    tally = Tally(Terms(1, 1, 1, 0.66), members, near, Ring(16), 1, 1)
    tally.shared = {0, 3, 4, 5}
    assert tally.settle() == {0}
    # Of member 3's four holders three are left, and of the others' three all.
    assert tally.shared == {3, 4, 5}


@pytest.mark.parametrize("gone", [{0, 1, 2, 3}, {0, 1, 2}, {0, 1}])
def test_nobody_trains_for_a_sum_that_cannot_be(gone: set[int]) -> None:
    held = draw(4, 1).share(gone)
    with pytest.raises(SecureError, match=f"{4 - len(gone)} of 4"):
        held.tally.settle()


def test_a_member_needs_others() -> None:
    held = draw(2, 3)
    with pytest.raises(SecureError, match="a sum of one member"):
        Member(Terms(1, 1, 1, 0.66), 0, held.members[0].keys, {})
    # By hand: two holders, of whom floor(0.66 * 2) + 1 = 2 are needed.
    assert held.members[0].needed == 2


@pytest.mark.parametrize(
    ("holders", "threshold", "needed"),
    [(2, 0.5, 2), (3, 0.5, 2), (3, 0.66, 2), (4, 0.66, 3), (10, 0.66, 7), (9, 0.9, 9)],
)
def test_more_than_the_threshold_are_needed(
    holders: int, threshold: float, needed: int
) -> None:
    assert Terms(1, 1, 1, threshold).needed(holders) == needed
    # Two groups of so many have a member in common.
    assert 2 * needed > holders


def test_the_ring_is_the_smallest_that_fits() -> None:
    found = [Ring.for_sum(n).bits for n in (1, 2**15 - 1, 2**15, 2**23, 2**31 - 1)]
    assert found == [16, 16, 24, 32, 32]
    with pytest.raises(ValueError, match="exceed 32 bits"):
        Ring.for_sum(2**31)


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_numbers_travel_in_as_many_bytes_as_they_need(bits: int) -> None:
    ring, ends = (
        Ring(bits),
        np.array([0, 1, -1, 2 ** (bits - 1) - 1, 1 - 2 ** (bits - 1)]),
    )
    packed = ring.pack(ends.astype(ring.dtype))
    assert len(packed) == 5 * bits // 8
    np.testing.assert_array_equal(ring.centred(ring.unpack(packed, 5)), ends)


@pytest.mark.parametrize("members", [31, 50, 101])
def test_a_graph_of_many_is_regular_and_its_edges_go_both_ways(members: int) -> None:
    each = degree(members, 0.66, 0.01)
    assert each < members - 1
    near = link(members, each, np.random.default_rng(1))
    for i, others in enumerate(near):
        assert len({*others}) == each
        assert i not in others
        assert all(i in near[j] for j in others)
    assert near != link(members, each, np.random.default_rng(2))


def test_few_mask_with_all() -> None:
    assert degree(COMPLETE, 0.66, 0.3) == COMPLETE - 1
    assert link(3, 2, np.random.default_rng(0)) == [[1, 2], [0, 2], [0, 1]]


def test_the_graph_of_many_is_safe_by_its_own_bound() -> None:
    """Against another computation of the same chances: sums of exact fractions."""
    members, threshold, colluding = 200, 0.66, 0.05
    each = degree(members, threshold, colluding)
    bad = 10

    def unsafe(each: int) -> Fraction:
        needed, half = int(threshold * (each + 1)) + 1, each // 2
        ways = sum(
            comb(bad, k) * comb(members - 1 - bad, each - k)
            for k in range(2 * needed - each - 1, min(bad, each) + 1)
        )
        apart = Fraction(bad**half, members**half)
        return members * (Fraction(ways, comb(members - 1, each)) + apart)

    assert unsafe(each) <= Fraction(1, 2**40) < unsafe(each - 2)
