"""What the server receives of a member says nothing of its values."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray
from scipy.stats import chi2

from slora_flwr.secure.masks import add_mask
from tests.support.secure import Held, draw

# Of a test that is right: once in 10^9.
RARE = 1e-9


def chi_square(data: bytes) -> float:
    """Return the chance of bytes as uneven as these, were all values as likely."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    expected = len(data) / 256
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum(), 255))


def received(values: NDArray[np.int64]) -> tuple[Held, bytes]:
    """Return what the server receives of member 0 among five."""
    held = draw(5, values.size)
    held.values[0] = values
    held.share().mask()
    return held, held.masked[0]


@pytest.mark.parametrize("size", [0, 1, 30_000])
def test_masked_bytes_are_uniform_whatever_the_values(size: int) -> None:
    values = np.full(40_000, size)
    assert chi_square(values.astype("<u2").tobytes()) < RARE
    assert chi_square(received(values)[1]) > RARE


def test_swapping_two_members_values_changes_nothing_but_the_masks() -> None:
    held = draw(3, 20_000)
    held.share().mask().tell()
    swapped = draw(3, 20_000)
    swapped.values[[0, 1]] = swapped.values[[1, 0]]
    swapped.share().mask().tell()
    for member in (0, 1):
        assert chi_square(held.masked[member]) > RARE
        assert chi_square(swapped.masked[member]) > RARE
        # Nor do the bytes of one run tell those of the other.
        one, other = (
            np.frombuffer(h.masked[member], np.uint8) for h in (held, swapped)
        )
        assert chi_square((one ^ other).tobytes()) > RARE
    for found, expected in zip(held.tally.open(), swapped.tally.open(), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_mask_is_the_key_stream_of_its_key() -> None:
    key = bytes(range(32))
    values = np.arange(300_001, dtype="<u2")  # more than a block, and odd
    figures = np.array([5, 6], "<u8")
    masked, told = values.copy(), figures.copy()
    add_mask((masked, told), key, 1)
    stream = Cipher(ChaCha20(key, bytes(16)), None).encryptor().update(bytes(1_300_000))
    block = 2**18
    # By blocks, whose unread ends are left out.
    at = np.concatenate(
        [
            np.frombuffer(stream[start : start + min(block, left)], "<u2")
            for start, left in ((0, block), (block, block), (2 * block, 75_714))
        ]
    )
    np.testing.assert_array_equal(masked, values + at)
    add_mask((masked, told), key, -1)
    np.testing.assert_array_equal(masked, values)
    np.testing.assert_array_equal(told, figures)


def test_masks_of_both_members_of_a_pair_cancel() -> None:
    held = draw(2, 100).share().mask()
    for member in held.members:
        assert not np.array_equal(
            held.ring.unpack(held.masked[member.number][:200], 100),
            held.values[member.number].astype("<u2"),
        )
    held.tell()
    np.testing.assert_array_equal(held.tally.open()[0], held.values.sum(axis=0))
