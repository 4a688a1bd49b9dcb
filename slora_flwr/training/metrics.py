"""Metrics of a classifier, from counts that add up over data sets."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Evaluation:
    """The results of a classifier on some examples.

    Attributes
    ----------
    loss : float
        Mean cross-entropy.
    counts : NDArray[np.int64]
        Shape (3, classes): right predictions, predictions, and labels of each class.
    errors : list[tuple[int, int, int]]
        Label, prediction and number of the commonest errors; never sent or pooled.
    """

    loss: float
    counts: NDArray[np.int64]
    errors: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def examples(self) -> int:
        """Number of examples."""
        return int(self.counts[2].sum())

    @property
    def accuracy(self) -> float:
        """Share of the predictions that are right."""
        return float(self.counts[0].sum() / self.examples)

    @property
    def macro_f1(self) -> float:
        """Unweighted mean of F1 over the classes that are predicted or occur.

        F1 of a class is 2·TP / (2·TP + FP + FN).
        """
        hits, predicted, labels = self.counts
        found = predicted + labels > 0
        return float(np.mean(2 * hits[found] / (predicted + labels)[found]))

    @property
    def majority_accuracy(self) -> float:
        """Accuracy of always predicting the commonest label."""
        return float(self.counts[2].max() / self.examples)


def count(
    predicted: NDArray[np.int64], labels: NDArray[np.int64], classes: int
) -> NDArray[np.int64]:
    """Return the counts of an `Evaluation`."""
    hits = predicted[predicted == labels]
    return np.stack(
        [np.bincount(a, minlength=classes) for a in (hits, predicted, labels)]
    )


def count_errors(
    predicted: NDArray[np.int64], labels: NDArray[np.int64], most: int = 1000
) -> list[tuple[int, int, int]]:
    """Return label, prediction and number of the commonest errors.

    They begin with the most frequent; among equals, with the lower class ids.
    """
    wrong = predicted != labels
    pairs = Counter(zip(labels[wrong].tolist(), predicted[wrong].tolist(), strict=True))
    found = sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))[:most]
    return [(label, instead, number) for (label, instead), number in found]


def pool(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Return the evaluation on the union of one or more data sets."""
    examples = [found.examples for found in evaluations]
    loss = np.average([found.loss for found in evaluations], weights=examples)
    counts = np.sum([found.counts for found in evaluations], axis=0)
    return Evaluation(float(loss), counts)
