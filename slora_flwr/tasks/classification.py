"""Classification of texts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from slora_flwr.config import DataConfig
from slora_flwr.data.examples import Batch, Examples
from slora_flwr.data.texts import Texts, in_one_array
from slora_flwr.tasks.base import Evaluation, Task


@dataclass(frozen=True)
class ClassifierEvaluation(Evaluation):
    """The results of a classifier on some examples.

    `counts` has shape (3, classes): right predictions, predictions, and labels of each
    class.
    """

    names = ("hits", "predictions", "labels")

    @property
    def examples(self) -> int:
        """Number of examples."""
        return int(self.counts[2].sum())

    @property
    def units(self) -> int:
        """Number of examples."""
        return self.examples

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


@dataclass(frozen=True)
class TextEncoder:
    """Makes tokens of a classifier's texts."""

    tokenizer: Any
    max_length: int

    @property
    def pad(self) -> int:
        """The padding token."""
        return int(self.tokenizer.pad_token_id)

    @property
    def description(self) -> str:
        """All that the tokens depend on besides the texts."""
        backend = self.tokenizer.backend_tokenizer
        # An earlier call's truncation would be part of the description.
        backend.no_truncation()
        return f"{self.max_length}\x1f{backend.to_str()}"

    def encode(self, texts: Texts) -> dict[str, NDArray[Any]]:
        """Return all texts' tokens, and where each text begins and ends."""
        encoded: list[list[int]] = []
        if texts.texts:
            encoded = self.tokenizer(
                texts.texts,
                truncation=True,
                max_length=self.max_length,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
        return in_one_array(encoded)


class Classification(Task):
    """Give each text one of some labels, by a head on the pretrained model."""

    metrics = ("accuracy", "macro_f1", "loss")
    references = ("majority_accuracy",)
    goal = "accuracy"
    has_classes = True

    def encoder(self, config: DataConfig, tokenizer: Any) -> TextEncoder:
        """Return what makes tokens of texts."""
        return TextEncoder(tokenizer, config.max_length)

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """Return the accuracy; None for that of a state that has diverged."""
        return metrics.get("accuracy") if "loss" in metrics else None

    def spoil(self, examples: Examples, classes: Sequence[str]) -> Examples:
        """Return the examples with labels rotated by one class."""
        return replace(examples, labels=(examples.labels + 1) % len(classes))

    def outputs(self, classes: Sequence[str]) -> int:
        """Return the number of classes."""
        return len(classes)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Return the sum of the cross-entropies."""
        logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
        return F.cross_entropy(logits.float(), batch.labels, reduction="sum")

    def evaluate(self, model: Any, batches: Iterable[Batch]) -> ClassifierEvaluation:
        """Return a model's results on batches; there is at least one."""
        predicted, labels, total = [], [], 0.0
        for ids, mask, right in batches:
            logits = model(input_ids=ids, attention_mask=mask).logits.float()
            total += float(F.cross_entropy(logits, right, reduction="sum"))
            predicted.append(logits.argmax(dim=-1).cpu())
            labels.append(right.cpu())
        all_labels = torch.cat(labels).numpy()
        counts = count(
            torch.cat(predicted).numpy(), all_labels, model.config.num_labels
        )
        return ClassifierEvaluation(total / len(all_labels), counts)

    def read(
        self, loss: float, counts: Mapping[str, Any], classes: Sequence[str]
    ) -> ClassifierEvaluation:
        """Return the evaluation that a node has sent; see `Task.read`."""
        given = [counts[name] for name in ClassifierEvaluation.names]
        found = ClassifierEvaluation(loss, np.array(given, dtype=np.int64))
        hits, predictions, labels = found.counts
        if (
            found.counts.shape != (3, len(classes))
            or (hits < 0).any()
            or (hits > np.minimum(predictions, labels)).any()
            # In Python's integers, which do not overflow.
            or sum(predictions.tolist()) != sum(labels.tolist())
        ):
            raise ValueError(found)
        return found


def count(
    predicted: NDArray[np.int64], labels: NDArray[np.int64], classes: int
) -> NDArray[np.int64]:
    """Return the counts of a `ClassifierEvaluation`."""
    hits = predicted[predicted == labels]
    return np.stack(
        [np.bincount(a, minlength=classes) for a in (hits, predicted, labels)]
    )
