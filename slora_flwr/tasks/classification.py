"""Classification of texts."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from slora_flwr.common.text import printable
from slora_flwr.config import DataConfig, RunConfig, refuse
from slora_flwr.data.examples import Batch, Examples
from slora_flwr.data.texts import Texts
from slora_flwr.data.tokens import in_one_array
from slora_flwr.runs.events import ClassRecord
from slora_flwr.tasks.base import Answer, Evaluation, Task

_USAGE = """\
import torch

model.eval()
texts = ["A text to classify."]
given = tokenizer(
    texts,
    truncation=True,
    max_length=LENGTH,
    padding=True,
    return_token_type_ids=False,
    return_tensors="pt",
)
with torch.no_grad():
    found = model(**given).logits.argmax(-1).tolist()
print([model.config.id2label[label] for label in found])
"""


@dataclass(frozen=True)
class ClassifierEvaluation(Evaluation):
    """The results of a classifier on some examples.

    `counts` has shape (3, classes): right predictions, predictions, and labels of each
    class.

    Attributes
    ----------
    errors : list[tuple[int, int, int]]
        Label, prediction and number of the commonest errors; never sent or pooled.
    """

    names = ("hits", "predictions", "labels")

    errors: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def examples(self) -> int:
        """Number of examples."""
        # In Python's integers, which do not overflow.
        return sum(self.counts[2].tolist())

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
    def by_class(self) -> ClassRecord:
        """What was predicted, by class."""
        right, predicted, labels = self.counts.tolist()
        return ClassRecord(right, predicted, labels, self.errors)

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


@dataclass(frozen=True)
class Prediction(Answer):
    """A text, its most probable label, and the probability of each label."""

    text: str
    label: str
    probabilities: dict[str, float]

    @property
    def probability(self) -> float:
        """The probability of the label."""
        return self.probabilities[self.label]

    @property
    def line(self) -> str:
        """The label, its probability and the text."""
        text = printable(self.text, 80)
        return f"{printable(self.label)}\t{self.probability:.3f}\t{text}"

    @property
    def facts(self) -> dict[str, Any]:
        """All that is known of it, for JSON."""
        return {
            "text": self.text,
            "label": self.label,
            "probability": self.probability,
            "probabilities": self.probabilities,
        }


class Classification(Task):
    """Give each text one of some labels, by a head on the pretrained model."""

    auto_class = "AutoModelForSequenceClassification"
    peft_type = "SEQ_CLS"
    pipeline = "text-classification"
    metrics = ("accuracy", "macro_f1", "loss")
    references = ("majority_accuracy",)
    goal = "accuracy"
    has_classes = True

    def check(self, config: RunConfig) -> None:
        """Refuse what takes a language model, and targets; see `Task.check`."""
        for key, given, off in (
            ("run.generate", config.run.generate, 0),
            ("run.choices", config.run.choices, ""),
            ("data.response", config.data.response, ""),
            ("data.messages", config.data.messages, ""),
        ):
            if given != off:
                raise refuse(
                    key, given, f"{off or 'empty'}, since task is {config.task}"
                )
        if config.run.target > 1:
            raise refuse("run.target", config.run.target, "a number from 0 up to 1")

    def encoder(self, config: DataConfig, tokenizer: Any) -> TextEncoder:
        """Return what makes tokens of texts."""
        return TextEncoder(tokenizer, config.max_length)

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """Return the accuracy; None for that of a state that has diverged."""
        return metrics.get("accuracy") if "loss" in metrics else None

    def reaches(self, metrics: Mapping[str, float], target: float) -> bool:
        """Return whether the accuracy is at least the target."""
        return metrics.get("accuracy", 0) >= target

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
        given, found = torch.cat(labels).numpy(), torch.cat(predicted).numpy()
        counts = count(found, given, model.config.num_labels)
        errors = count_errors(found, given)
        return ClassifierEvaluation(total / len(given), counts, errors)

    def answer(
        self,
        model: Any,
        encoder: TextEncoder,
        classes: Sequence[str],
        texts: Texts,
        most: int | None = None,
    ) -> Iterator[Prediction]:
        """Yield the labels of texts; see `Task.answer`."""
        if most is not None:
            raise refuse("--max-tokens", most, "none, since labels are no responses")
        rows = encoder.encode(texts)
        labels = np.zeros(len(texts.texts), dtype=np.int64)
        examples = Examples(**rows, labels=labels, pad=encoder.pad)
        found = np.empty((len(labels), len(classes)), dtype=np.float32)
        for batch in examples.in_order_of_length(64):
            ids, mask, _ = examples.batch(batch).to(model.device)
            logits = model(input_ids=ids, attention_mask=mask).logits.float()
            found[batch] = logits.softmax(dim=-1).cpu().numpy()
        for text, row in zip(texts.texts, found, strict=True):
            probabilities = dict(zip(classes, map(float, row), strict=True))
            yield Prediction(text, classes[int(row.argmax())], probabilities)

    def describe(self, classes: int) -> str:
        """Return what a model of the task is, as a sentence for its card."""
        return (
            f"A classifier of texts with {classes} classes, which `classes.json` names."
        )

    def usage(self, encoder: TextEncoder) -> str:
        """Return Python that has `model` answer, with stock transformers."""
        return _USAGE.replace("LENGTH", str(encoder.max_length))

    def read(
        self, loss: float, counts: Mapping[str, Any], classes: int
    ) -> ClassifierEvaluation:
        """Return the evaluation that a node has sent; see `Task.read`."""
        given = [counts[name] for name in ClassifierEvaluation.names]
        found = ClassifierEvaluation(loss, np.array(given, dtype=np.int64))
        hits, predictions, labels = found.counts
        if (
            found.counts.shape != (3, classes)
            or (hits < 0).any()
            or (hits > np.minimum(predictions, labels)).any()
            or sum(predictions.tolist()) != found.examples
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
