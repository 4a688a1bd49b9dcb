"""How metrics are told: their names and forms."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slora_flwr.runs.events import RecordedRound

# By which targets are worse than full fine-tuning: a point of accuracy, or this share
# of a perplexity.
MARGIN = 0.01
# Name and form by metric, in the order in which they are told.
FORMS = {
    "perplexity": ("perplexity", ".2f"),
    "accuracy": ("accuracy", ".1%"),
    "macro_f1": ("macro-F1", ".3f"),
    "loss": ("loss", ".3f"),
    "exact_match": ("exact match", ".1%"),
    "rouge_l": ("ROUGE-L", ".3f"),
    "choice_accuracy": ("choice accuracy", ".1%"),
}


def tell(metric: str, value: float | None) -> str:
    """Return a metric with its name; a dash stands for a value that overflowed."""
    name, form = FORMS[metric]
    return f"{name} -" if value is None else f"{name} {value:{form}}"


def first_of(metrics: Mapping[str, float]) -> str:
    """Return the name of the metric by which a run is told in short."""
    return next((name for name in FORMS if name in metrics), "accuracy")


def accuracy_interval(accuracy: float, examples: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of an accuracy over independent examples."""
    from scipy.stats import binomtest  # takes a second to import

    right = binomtest(round(accuracy * examples), examples)
    found = right.proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


@dataclass(frozen=True)
class Headline:
    """The metric by which a run is told in short, as charts and tables show it.

    Attributes
    ----------
    metric : str
        Its name in events.
    form : str
        Its form in a text.
    scale : int
        What it is multiplied with in charts and tables.
    unit : str
        What follows its name there.
    is_lower_better : bool
        Whether less of it is better.
    last : int
        How many of a run's last evaluations make its steadier figure, their mean.
    """

    metric: str
    form: str
    scale: int = 1
    unit: str = ""
    is_lower_better: bool = False
    last: int = 5

    @property
    def name(self) -> str:
        """Its name in a text."""
        return FORMS[self.metric][0]

    @property
    def axis(self) -> str:
        """Its name with the unit."""
        return f"{self.name}{self.unit}"

    @property
    def spec(self) -> str:
        """The format of numbers in tables."""
        return ".1f" if self.scale > 1 else ".2f"

    @property
    def percent(self) -> str:
        """What ends the names of its columns in CSV."""
        return "_percent" if self.scale > 1 else ""

    @property
    def better(self) -> Callable[..., Any]:
        """`min` or `max`, whichever chooses the best of several values."""
        return min if self.is_lower_better else max

    def reaches(self, value: float, target: float) -> bool:
        """Return whether a value is as good as a target."""
        return value <= target if self.is_lower_better else value >= target

    def nearly(self, value: float) -> float:
        """Return what is worse than a value by the margin of targets; see `margin`."""
        return value * (1 + MARGIN) if self.is_lower_better else value - MARGIN

    @property
    def margin(self) -> str:
        """How far targets are from a value."""
        share = f"{100 * MARGIN:g}"
        return f"{share}% above" if self.is_lower_better else f"{share} point below"

    def best(self, rounds: Sequence[RecordedRound]) -> RecordedRound | None:
        """Return the first round with the best value; None if none has one."""
        known = [done for done in rounds if self.metric in done.metrics]
        found: RecordedRound | None = self.better(
            known, key=lambda done: done.metrics[self.metric], default=None
        )
        return found


ACCURACY = Headline("accuracy", ".1%", 100, ", %")
PERPLEXITY = Headline("perplexity", ".2f", is_lower_better=True)


def headline_of(rounds: Sequence[RecordedRound]) -> Headline:
    """Return the metric by which rounds are told: perplexity if any has one."""
    has_perplexity = any(PERPLEXITY.metric in done.metrics for done in rounds)
    return PERPLEXITY if has_perplexity else ACCURACY
