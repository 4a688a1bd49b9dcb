"""Metrics of a classifier."""

import numpy as np
from numpy.typing import NDArray


def accuracy(predicted: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Share of the predictions that are right."""
    return float(np.mean(predicted == labels))


def macro_f1(predicted: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Unweighted mean of F1 over the classes that occur in either argument.

    F1 of a class is 2·TP / (2·TP + FP + FN).
    """
    classes = np.union1d(predicted, labels)
    scores = []
    for c in classes:
        hits = np.sum((predicted == c) & (labels == c))
        scores.append(2 * hits / (np.sum(predicted == c) + np.sum(labels == c)))
    return float(np.mean(scores))
