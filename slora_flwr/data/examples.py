"""Tokenised examples with labels, and their batches."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Batches are cut from windows of this many batches, nearly sorted by length.
WINDOW = 8


@dataclass(frozen=True)
class Examples:
    """Tokenised texts with their class ids.

    Attributes
    ----------
    tokens : NDArray[np.int32]
        All texts' tokens in one array.
    offsets : NDArray[np.int64]
        Text i is `tokens[offsets[i]:offsets[i + 1]]`; shape (texts + 1,).
    labels : NDArray[np.int64]
        Class ids.
    pad : int
        The padding token.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64]
    pad: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens in each text."""
        return np.diff(self.offsets)

    def select(self, rows: NDArray[np.int64]) -> "Examples":
        """Return a copy of some rows, in the order given."""
        pieces = [self.tokens[self.offsets[r] : self.offsets[r + 1]] for r in rows]
        tokens = np.concatenate([*pieces, np.empty(0, dtype=np.int32)])
        offsets = np.concatenate([[0], np.cumsum(self.lengths[rows])])
        return Examples(tokens.astype(np.int32), offsets, self.labels[rows], self.pad)

    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Return a batch of rows, padded to the longest.

        Returns
        -------
        input_ids, attention_mask, labels : Tensor
            int64, shapes (rows, length), (rows, length) and (rows,).
        """
        lengths = self.lengths[rows]
        columns = np.arange(max(1, int(lengths.max())))
        mask = columns < lengths[:, None]
        ids = np.full(mask.shape, self.pad, dtype=np.int64)
        ids[mask] = self.tokens[(self.offsets[rows][:, None] + columns)[mask]]
        return (
            torch.from_numpy(ids),
            torch.from_numpy(mask.astype(np.int64)),
            torch.from_numpy(self.labels[rows]),
        )

    def shuffled(
        self, batch_size: int, stream: np.random.Philox
    ) -> Iterator[NDArray[np.int64]]:
        """Yield one epoch's batches of rows of similar length, in random order.

        Sizes of batches differ by at most one row, so that no batch weighs much more
        than another, and none exceeds `batch_size`.
        """
        if not len(self):
            return
        count = -(-len(self) // batch_size)
        order = np.argsort(stream.random_raw(len(self)), kind="stable")
        batches = []
        for pieces in np.array_split(np.arange(count), -(-count // WINDOW)):
            first, end = pieces[0], pieces[-1] + 1
            window = order[first * len(self) // count : end * len(self) // count]
            window = self._nearly_sorted(window, len(window) / len(pieces), stream)
            batches += np.array_split(window, len(pieces))
        turns = np.argsort(stream.random_raw(count), kind="stable")
        for turn in turns:
            yield batches[turn]

    def _nearly_sorted(
        self, rows: NDArray[np.int64], blur: float, stream: np.random.Philox
    ) -> NDArray[np.int64]:
        """Return rows sorted by length, each late by up to `blur` places.

        Sorted exactly, a client of a single window would have the same batches in every
        epoch.
        """
        rows = rows[np.argsort(self.lengths[rows], kind="stable")]
        late = stream.random_raw(len(rows)) / 2.0**64 * blur
        return rows[np.argsort(np.arange(len(rows)) + late, kind="stable")]

    def in_order_of_length(self, batch_size: int) -> Iterator[NDArray[np.int64]]:
        """Yield batches of all rows with the least padding, for evaluation."""
        order = np.argsort(self.lengths, kind="stable")
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]
