"""What a task says: a batch's loss, and metrics whose counts add up over clients."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slora_flwr.config import DataConfig, RunConfig
from slora_flwr.data.dialogues import Dialogue
from slora_flwr.data.examples import Batch, Examples
from slora_flwr.data.texts import Texts
from slora_flwr.data.tokens import Encoder
from slora_flwr.runs.events import ClassRecord

E = TypeVar("E", bound="Evaluation")
# Measures more of a model in evaluation mode; returns metrics by name.
Probe = Callable[[Any], dict[str, float]]


@dataclass(frozen=True)
class Evaluation(ABC):
    """The results of a model on some examples.

    Attributes
    ----------
    loss : float
        Mean loss over `units`.
    counts : NDArray[np.int64]
        Sums over the examples; `names` are those of its rows, in messages.
    """

    names: ClassVar[tuple[str, ...]]

    loss: float
    counts: NDArray[np.int64]

    @property
    @abstractmethod
    def examples(self) -> int:
        """Number of examples."""

    @property
    @abstractmethod
    def units(self) -> int:
        """Number of what the loss is the mean over."""

    @property
    @abstractmethod
    def accuracy(self) -> float:
        """Share of the predictions that are right."""

    @property
    def by_class(self) -> ClassRecord | None:
        """What was predicted, by class; None without classes."""
        return None

    def figures(self, names: Iterable[str]) -> dict[str, float]:
        """Return some of the metrics, by name."""
        return {name: float(getattr(self, name)) for name in names}


def pool(evaluations: Sequence[E]) -> E:
    """Return the evaluation on the union of one or more data sets."""
    units = [found.units for found in evaluations]
    loss = np.average([found.loss for found in evaluations], weights=units)
    counts = np.sum([found.counts for found in evaluations], axis=0)
    return replace(evaluations[0], loss=float(loss), counts=counts)


class Answer(ABC):
    """What a model says to a text."""

    @property
    @abstractmethod
    def line(self) -> str:
        """The answer in a line, safe to print."""

    @property
    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """All that is known of it, for JSON."""


class Sample(NamedTuple):
    """One of the test data's prompts, what is right, and what a model says."""

    prompt: str
    right: str
    said: str


class Task(ABC):
    """What an example, a loss and a metric are.

    Attributes
    ----------
    auto_class, pipeline : str
        transformers' names for its models.
    peft_type : str
        PEFT's name for it, a `peft.TaskType`.
    metrics : tuple[str, ...]
        The metrics of a state, as in summary.json.
    extras : tuple[str, ...]
        Metrics that a run config can ask for besides; see `probes`.
    references : tuple[str, ...]
        Metrics of the test data alone, which a state's are compared with.
    goal : str
        The metric by which the best round is told.
    has_classes : bool
        Whether each text has one of some labels. Otherwise texts are dialogues.
    """

    auto_class: ClassVar[str]
    peft_type: ClassVar[str]
    pipeline: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    extras: ClassVar[tuple[str, ...]] = ()
    references: ClassVar[tuple[str, ...]] = ()
    goal: ClassVar[str]
    has_classes: ClassVar[bool]

    @abstractmethod
    def check(self, config: RunConfig) -> None:
        """Raise ConfigError for what a run asks of the task that cannot be had here."""

    @abstractmethod
    def encoder(self, config: DataConfig, tokenizer: Any) -> Encoder:
        """Return what makes tokens of the task's texts.

        Raises
        ------
        ConfigError
            If the model's tokenizer does not allow it.
        """

    @abstractmethod
    def score(self, metrics: Mapping[str, float]) -> float | None:
        """Return how good a state is; None if its metrics do not tell."""

    @abstractmethod
    def reaches(self, metrics: Mapping[str, float], target: float) -> bool:
        """Return whether a state is as good as a run's `run.target`."""

    @abstractmethod
    def spoil(self, examples: Examples, classes: Sequence[str]) -> Examples:
        """Return a hostile client's examples, with something else to learn of them."""

    @abstractmethod
    def outputs(self, classes: Sequence[str]) -> int | None:
        """Return a classifier's number of outputs; None for a language model."""

    def longest_text(self, data: DataConfig) -> int | None:
        """Return the most tokens that an exported tokeniser reads; None for its own."""
        return data.max_length

    def run(self, model: Any, ids: Tensor, mask: Tensor) -> None:
        """Run a model on texts, as far as the loss needs it."""
        model(input_ids=ids, attention_mask=mask)

    def misfit(self, model: Any) -> str:
        """Return what keeps the task from using a model; empty if nothing does.

        Parameters
        ----------
        model : transformers.PreTrainedModel
            The backbone's model, in evaluation mode.
        """
        return ""

    @abstractmethod
    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Return the sum of a batch's losses, for the backward pass.

        Parameters
        ----------
        model : transformers.PreTrainedModel
            The backbone's model, in training mode.
        batch : Batch
            On the model's device.
        """

    def output_bytes(self, model: Any, tokens: int) -> int:
        """Return the most bytes of outputs that `loss` holds at a time.

        Their gradients count, and those of the weights that make them. A classifier's
        few do not.

        Parameters
        ----------
        model : transformers.PreTrainedModel
            The backbone's model, with an adapter attached.
        tokens : int
            Number of the batch's tokens.
        """
        return 0

    @abstractmethod
    def evaluate(self, model: Any, batches: Iterable[Batch]) -> Evaluation:
        """Return a model's results on batches; there is at least one.

        Parameters
        ----------
        model : transformers.PreTrainedModel
            The backbone's model, in evaluation mode.
        batches : Iterable[Batch]
            On the model's device.
        """

    def probes(
        self, config: RunConfig, encoder: Any, asked: Sequence[Dialogue]
    ) -> list[Probe]:
        """Return what a run config has the server measure besides; nothing here.

        Parameters
        ----------
        config : RunConfig
            The run.
        encoder : Encoder
            The task's own.
        asked : Sequence[Dialogue]
            The test dialogues to which `run.generate` has responses generated.

        Raises
        ------
        ConfigError
            If that cannot be measured.
        """
        return []

    @abstractmethod
    def answer(
        self,
        model: Any,
        encoder: Any,
        classes: Sequence[str],
        texts: Texts,
        most: int | None = None,
    ) -> Iterator[Answer]:
        """Yield a model's answers to texts, in their order.

        Parameters
        ----------
        model : transformers.PreTrainedModel
            The backbone's model, in evaluation mode.
        encoder : Encoder
            The task's own, of the model's tokenizer.
        classes : Sequence[str]
            The label names.
        texts : Texts
            The texts, or the dialogues in which a response is due.
        most : int or None
            The most tokens of an answer; None for the task's own.

        Raises
        ------
        ConfigError
            If answers have no tokens and `most` is given.
        """

    def sample(self, model: Any, encoder: Any, examples: Examples) -> list[Sample]:
        """Return what a model says to a few examples, if people like to read it.

        Parameters
        ----------
        model, encoder
            As in `answer`.
        examples : Examples
            The server's test data.
        """
        return []

    @abstractmethod
    def describe(self, classes: int) -> str:
        """Return what a model of the task is, as a sentence for its card."""

    @abstractmethod
    def usage(self, encoder: Any) -> str:
        """Return Python that has `model` answer, with stock transformers.

        Parameters
        ----------
        encoder : Encoder
            The task's own, of the model's tokenizer.
        """

    @abstractmethod
    def read(self, loss: float, counts: Mapping[str, Any], classes: int) -> Evaluation:
        """Return the evaluation that a node has sent.

        Parameters
        ----------
        loss : float
            The mean loss.
        counts : Mapping[str, Any]
            The counts by name, unchecked.
        classes : int
            Number of label names.

        Raises
        ------
        ValueError
            If they cannot be those of examples.
        """
