"""Tokenised examples with labels, and their batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# The label of a token that nobody learns to predict: PyTorch's own mark.
IGNORED = -100
# Batches are cut from windows of this many batches, nearly sorted by length.
WINDOW = 8


class Batch(NamedTuple):
    """Examples padded to the longest: int64, shapes (rows, length) but of `labels`.

    Labels are class ids, shape (rows,), or the tokens to predict, shape (rows, length).
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        return Batch(*(tensor.to(device) for tensor in self))


@dataclass(frozen=True)
class Examples:
    """Tokenised texts with what is learned of them: class ids, or tokens.

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
    learned : NDArray[np.bool_] or None
        Which of `tokens` a language model learns to predict; None for a classifier.
        What a text begins with cannot be predicted, and counts as not learned.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64]
    pad: int
    learned: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens in each text."""
        return np.diff(self.offsets)

    @cached_property
    def units(self) -> NDArray[np.int64]:
        """What each text counts as in losses: one, or its number of learned tokens."""
        if self.learned is None:
            return np.ones(len(self), dtype=np.int64)
        sums = np.cumsum([0, *self.learned], dtype=np.int64)
        return sums[self.offsets[1:]] - sums[self.offsets[:-1]]

    def select(self, rows: NDArray[np.int64]) -> "Examples":
        """Return a copy of some rows, in the order given."""
        places = [np.arange(self.offsets[r], self.offsets[r + 1]) for r in rows]
        chosen = np.concatenate([*places, np.empty(0, dtype=np.int64)])
        offsets = np.concatenate([[0], np.cumsum(self.lengths[rows])])
        learned = None if self.learned is None else self.learned[chosen]
        tokens, labels = self.tokens[chosen], self.labels[rows]
        return Examples(tokens, offsets, labels, self.pad, learned)

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        """Return a batch of rows."""
        lengths = self.lengths[rows]
        columns = np.arange(max(1, int(lengths.max())))
        mask = columns < lengths[:, None]
        ids = np.full(mask.shape, self.pad, dtype=np.int64)
        places = (self.offsets[rows][:, None] + columns)[mask]
        ids[mask] = self.tokens[places]
        labels = self.labels[rows]
        if self.learned is not None:
            labels = np.full(mask.shape, IGNORED, dtype=np.int64)
            labels[mask] = np.where(self.learned[places], self.tokens[places], IGNORED)
        return Batch(
            torch.from_numpy(ids),
            torch.from_numpy(mask.astype(np.int64)),
            torch.from_numpy(labels),
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

    def in_order_of_length(
        self, batch_size: int, tokens: int = 0
    ) -> Iterator[NDArray[np.int64]]:
        """Yield batches of all rows with the least padding, for evaluation.

        None has more than `tokens` tokens, padding included, unless it is a single text
        or `tokens` is 0.
        """
        order = np.argsort(self.lengths, kind="stable")
        for start in range(0, len(order), batch_size):
            yield from self._within(order[start : start + batch_size], tokens)

    def parts(
        self, rows: NDArray[np.int64], count: int, tokens: int = 0
    ) -> Iterator[NDArray[np.int64]]:
        """Yield a batch's rows in `count` parts, if there are as many rows.

        Each is split further until it has at most `tokens` tokens, as in
        `in_order_of_length`. Rows are sorted by length if they are split at all.
        """
        if count == 1 and self._fits(rows, tokens):
            yield rows
            return
        rows = rows[np.argsort(self.lengths[rows], kind="stable")]
        for part in np.array_split(rows, min(count, len(rows))):
            yield from self._within(part, tokens)

    def _within(
        self, rows: NDArray[np.int64], tokens: int
    ) -> Iterator[NDArray[np.int64]]:
        """Yield rows, sorted by length, in as few batches of `tokens` as they fill."""
        start = 0
        for end in range(1, len(rows)):
            if not self._fits(rows[start : end + 1], tokens):
                yield rows[start:end]
                start = end
        yield rows[start:]

    def _fits(self, rows: NDArray[np.int64], tokens: int) -> bool:
        return not tokens or len(rows) * int(self.lengths[rows].max()) <= tokens
