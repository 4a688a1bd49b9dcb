"""The field GF(2^128), in which secrets are shared, and polynomials over it.

An element's bits are the coefficients of a polynomial over GF(2), modulo x^128 + x^7 +
x^2 + x + 1. A `Pair` is two elements that are computed with at once, one of them 256
bits above the other. Pairs are secret; what they are multiplied by is public, and alone
decides which steps are taken.

Shares are the same as those of PyCryptodome's `Crypto.Protocol.SecretSharing`, against
which tests check them. That takes some thirty times as long, which a server of a
thousand nodes would notice: it recovers a thousand secrets in each round.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache

Pair = int

_SIZE = 16
_BITS = 8 * _SIZE
_LANE = 2 * _BITS
_MODULUS = 1 << _BITS | 0b10000111
_LOW = (1 << _BITS) - 1
_LOWS = _LOW | _LOW << _LANE


def read_pair(data: bytes) -> Pair:
    """Return the two elements in 32 bytes, each big-endian."""
    return int.from_bytes(data[:_SIZE]) | int.from_bytes(data[_SIZE:]) << _LANE


def write_pair(pair: Pair) -> bytes:
    """Return the 32 bytes of two elements."""
    return (pair & _LOW).to_bytes(_SIZE) + (pair >> _LANE).to_bytes(_SIZE)


def times(pair: Pair, factor: int) -> Pair:
    """Return a pair times an element."""
    product = 0
    for place in _places(factor):
        product ^= pair << place
    return _reduce(product, factor.bit_length())


def evaluate(coefficients: Iterable[Pair], at: int) -> Pair:
    """Return the value of a polynomial, given from its highest coefficient down."""
    value = 0
    for coefficient in coefficients:
        value = times(value, at) ^ coefficient
    return value


class Curve:
    """The polynomial of least degree through some points.

    In Newton's form, a sum of products of x - x_0, x - x_1, …, whose coefficients are
    divided differences.

    Parameters
    ----------
    places : Sequence[int]
        Different elements.
    values : Iterable[Pair]
        The value at each.
    """

    def __init__(self, places: Sequence[int], values: Iterable[Pair]) -> None:
        found = [*values]
        for step in range(1, len(places)):
            for i in range(len(places) - 1, step - 1, -1):
                apart = _inverse(places[i] ^ places[i - step])
                found[i] = times(found[i] ^ found[i - 1], apart)
        self._terms = [*zip(places, found, strict=True)][::-1]

    def at(self, place: int) -> Pair:
        """Return its value."""
        value = 0
        for own, coefficient in self._terms:
            value = times(value, own ^ place) ^ coefficient
        return value


# As many as there are places in a round of a thousand, or differences of them.
@lru_cache(maxsize=2**12)
def _places(factor: int) -> tuple[int, ...]:
    """Return which bits of an element are set."""
    return tuple(i for i in range(factor.bit_length()) if factor >> i & 1)


@lru_cache(maxsize=2**12)
def _inverse(element: int) -> int:
    """Return the inverse of an element other than 0, by Euclid's algorithm."""
    high, low, of_high, of_low = _MODULUS, element, 0, 1
    while low > 1:
        shift = high.bit_length() - low.bit_length()
        if shift < 0:
            high, low, of_high, of_low = low, high, of_low, of_high
            continue
        high ^= low << shift
        of_high ^= of_low << shift
    return of_low


def _reduce(product: int, places: int) -> Pair:
    """Return a product modulo the field's polynomial, given the factor's bits."""
    while places > 0:
        over = product >> _BITS & _LOWS
        product = product & _LOWS ^ over ^ over << 1 ^ over << 2 ^ over << 7
        places -= _BITS - 7
    return product
