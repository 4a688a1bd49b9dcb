"""Shares and the field that they are in, against PyCryptodome's."""

import os

import pytest
from Crypto.Protocol.SecretSharing import Shamir, _Element
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slora_flwr.secure.field import Curve, read_pair, times, write_pair
from slora_flwr.secure.shares import Shared, join, split

PAIRS = st.binary(min_size=32, max_size=32)
LARGEST = 2**128 - 1


@given(data=PAIRS, factor=st.integers(0, LARGEST))
@example(data=b"\xff" * 32, factor=LARGEST)
def test_a_product_is_that_of_each_element(data: bytes, factor: int) -> None:
    halves = (_Element(data[:16]), _Element(data[16:]))
    other = _Element(factor)
    products = [half * other for half in halves]  # type: ignore[operator]
    expected = b"".join(product.encode() for product in products)
    assert write_pair(times(read_pair(data), factor)) == expected


@given(secret=PAIRS, drawn=st.data())
@settings(max_examples=30)
def test_shares_are_pycryptodomes(secret: bytes, drawn: st.DataObject) -> None:
    """Each side recovers what the other has split."""
    holders = drawn.draw(st.integers(2, 40))
    needed = drawn.draw(st.integers(2, holders))
    places = st.permutations(range(holders)).map(lambda drawn: drawn[:needed])
    chosen = drawn.draw(places)
    ours = split(secret, needed, holders)
    for cut in (slice(16), slice(16, None)):
        told = [(place + 1, ours[place][cut]) for place in chosen]
        assert Shamir.combine(told, ssss=False) == secret[cut]
    cuts = (secret[:16], secret[16:])
    halves = [Shamir.split(needed, holders, half, ssss=False) for half in cuts]
    theirs = [one[1] + other[1] for one, other in zip(*halves, strict=True)]
    assert join({place: theirs[place] for place in chosen}, needed) == secret


@pytest.mark.parametrize(("needed", "holders"), [(2, 2), (7, 10), (45, 67), (300, 400)])
def test_the_other_shares_follow_from_enough(needed: int, holders: int) -> None:
    secret = os.urandom(32)
    shares = split(secret, needed, holders)
    shared = Shared(
        {place: shares[place] for place in range(holders - needed, holders)}
    )
    assert shared.secret == secret
    assert [shared.share(place) for place in range(holders)] == shares


def test_a_line_by_hand() -> None:
    curve = Curve([1, 2], [5, 3])
    # Its slope is (5 ^ 3) / (1 ^ 2) = 6 / 3 = 2, since x (x + 1) = x^2 + x.
    assert [curve.at(place) for place in (0, 1, 2)] == [7, 5, 3]
