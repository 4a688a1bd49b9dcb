"""Reference for draws of distinct numbers."""

import numpy as np


def reference_distinct(philox_key: int, count: int, size: int) -> list[int]:
    """Return distinct numbers, drawn one word at a time."""
    if 2 * count > size:
        left_out = set(reference_distinct(philox_key, size - count, size))
        return [i for i in range(size) if i not in left_out]
    stream = np.random.Philox(key=philox_key)
    chosen: dict[int, None] = {}
    while len(chosen) < count:
        word = int(stream.random_raw())
        if word < 2**64 - 2**64 % size:
            chosen[word % size] = None
    return sorted(chosen)
