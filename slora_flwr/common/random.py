"""Keyed random streams, the same on every machine and version."""

import hashlib

import numpy as np
from numpy.typing import NDArray


def key(*parts: object) -> int:
    """Return a 128-bit key for `numpy.random.Philox`, hashed from the parts.

    Boundaries between parts count: `key("a", "b")` is not `key("ab")`.
    """
    joined = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts)
    return int.from_bytes(hashlib.blake2b(joined.encode(), digest_size=16).digest())


def partition_key(seed: int, purpose: str) -> int:
    """Return a 128-bit key for partitioning data, unrelated to any of `key`."""
    text = f"slora partition, seed {int(seed)}, {purpose}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest())


def partition_generator(seed: int, purpose: str) -> np.random.Generator:
    """Return a generator for one purpose in partitioning data."""
    return np.random.Generator(np.random.Philox(key=partition_key(seed, purpose)))


def draw_distinct(stream: np.random.Philox, count: int, size: int) -> NDArray[np.int64]:
    """Draw the first `count` distinct numbers below `size` of a raw stream, sorted.

    Parameters
    ----------
    stream : numpy.random.Philox
        The bit generator. The number of words read from it is unspecified.
    count, size : int
        Number of draws, and of values to draw from; `count <= size`.

    Returns
    -------
    NDArray[np.int64]
        Shape (count,), ascending. Every subset is equally likely.
    """
    if 2 * count > size:
        left_out = draw_distinct(stream, size - count, size)
        return np.delete(np.arange(size, dtype=np.int64), left_out)
    # A 64-bit word modulo size is uniform if words above the last whole multiple of
    # size are rejected.
    limit = np.uint64((2**64 // size) * size - 1)
    drawn = np.empty(0, dtype=np.int64)
    while True:
        words = np.atleast_1d(stream.random_raw(count + count // 4 + 16))
        words = words[words <= limit] % np.uint64(size)
        drawn = np.concatenate([drawn, words.astype(np.int64)])
        distinct, first = np.unique(drawn, return_index=True)
        if len(distinct) >= count:
            return np.sort(drawn[np.sort(first)[:count]])


def sample_cohort(
    clients: list[int], count: int, seed: int, server_round: int
) -> list[int]:
    """Draw a round's cohort without replacement, a function of (seed, round) only.

    The result is in ascending order.
    """
    if not clients:
        return []
    stream = np.random.Philox(key=key("cohort", seed, server_round))
    drawn = draw_distinct(stream, min(count, len(clients)), len(clients))
    return [clients[i] for i in drawn]
