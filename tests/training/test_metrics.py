"""Figures of several parts."""

import numpy as np
import pytest

from slora_flwr.tasks.base import pool
from slora_flwr.tasks.classification import ClassifierEvaluation, count, count_errors


def test_figures_of_parts_pool_to_those_of_the_whole() -> None:
    draw = np.random.default_rng(0)
    predicted, labels = draw.integers(0, 4, 90), draw.integers(0, 4, 90)
    cuts = [slice(0, 10), slice(10, 40), slice(40, 90)]
    parts = [
        ClassifierEvaluation(loss, count(predicted[cut], labels[cut], 5))
        for loss, cut in zip([1.0, 2.0, 4.0], cuts, strict=True)
    ]
    whole = pool(parts)
    assert whole.examples == 90
    assert whole.loss == pytest.approx((10 * 1 + 30 * 2 + 50 * 4) / 90)
    assert whole.accuracy == pytest.approx(np.mean(predicted == labels))
    scores = []
    for c in range(4):
        right = np.sum((predicted == c) & (labels == c))
        wrong = np.sum((predicted == c) != (labels == c))
        scores.append(right / (right + wrong / 2))
    assert whole.macro_f1 == pytest.approx(np.mean(scores))
    assert whole.majority_accuracy == max(np.bincount(labels)) / 90


def test_the_commonest_errors_come_first() -> None:
    labels = np.array([0, 0, 0, 1, 2, 2, 2, 1])
    predicted = np.array([0, 1, 1, 2, 0, 0, 2, 0])
    assert count_errors(predicted, labels) == [
        (0, 1, 2),
        (2, 0, 2),
        (1, 0, 1),
        (1, 2, 1),
    ]
    assert count_errors(predicted, labels, most=1) == [(0, 1, 2)]
    assert count_errors(labels, labels) == []
