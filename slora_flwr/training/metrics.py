"""Metrics of a classifier, from counts that add up over data sets."""

from collections.abc import Sequence
from dataclasses import dataclass

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
    """

    loss: float
    counts: NDArray[np.int64]

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


def pool(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Return the evaluation on the union of one or more data sets."""
    examples = [found.examples for found in evaluations]
    loss = np.average([found.loss for found in evaluations], weights=examples)
    counts = np.sum([found.counts for found in evaluations], axis=0)
    return Evaluation(float(loss), counts)
