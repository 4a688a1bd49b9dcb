"""How metrics are told: their names and forms."""

from collections.abc import Mapping

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
