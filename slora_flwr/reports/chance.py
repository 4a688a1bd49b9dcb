"""What is said of a run that may end, or has ended, near the majority class."""

from collections.abc import Mapping, Sequence
from typing import Any

from slora_flwr.common.text import counted, printable, shorten
from slora_flwr.config import RunConfig

# How far above the majority class's share an accuracy says nothing yet: two points.
_NEAR = 0.02
# The most that rounds times clients a round times alpha may be where runs ended at the
# majority class: docs/results.md, "News Category" (20 rounds of 5 clients at 0.1).
_LITTLE = 10.0
# The text on which the embedded model was pretrained, and learns from in few rounds.
_EMBEDDED, _EMBEDDED_TEXT = "embedded", "stdlib-docs"
_OF_LABELS = ("dirichlet", "virtual")  # partitioners that have an alpha


def foresee(config: RunConfig) -> list[str]:
    """Return warnings of what makes a run likely to end near the majority class.

    They depend on the config alone, so that a private run may tell them.

    Parameters
    ----------
    config : RunConfig
        The run.
    """
    clients, told = config.clients, []
    if _is_foreign(config):
        told.append(
            "model.name is embedded, a tiny model that has seen the documentation of "
            f"Python's library alone, and data.name is "
            f"{printable(repr(config.data.name))}. On other text it may learn nothing: "
            "name a model of the Hub, such as sentence-transformers/all-MiniLM-L6-v2"
        )
    amount = config.rounds * clients.per_round * clients.alpha
    if (
        config.data.name != _EMBEDDED_TEXT
        and _is_dealt_by_alpha(config)
        and clients.per_round < clients.count
        and amount <= _LITTLE
    ):
        told.append(
            f"{counted(config.rounds, 'round')} of "
            f"{counted(clients.per_round, 'client')} at clients.alpha "
            f"{clients.alpha:g}: the product is {amount:.3g}, and where it was "
            f"{_LITTLE:g} or less, runs have ended near the majority class (docs, "
            f"Your own text). Try {_list(_remedies(config))}"
        )
    return told


def tell_chance(config: RunConfig, figures: Mapping[str, Any]) -> str:
    """Return a warning that the last accuracy is near the majority class; else "".

    Parameters
    ----------
    config : RunConfig
        The run.
    figures : Mapping[str, Any]
        The final `accuracy` and `majority_accuracy`; None if nothing was evaluated.
    """
    accuracy, majority = figures["accuracy"], figures.get("majority_accuracy")
    if accuracy is None or majority is None:
        return ""
    above = round(accuracy - majority, 9)  # without the rounding errors of shares
    if above > _NEAR:
        return ""
    where, well = "within two points of", "about as well"
    if above < -_NEAR:
        where, well = "below", "better"
    return (
        f"The accuracy, {accuracy:.1%}, is {where} the majority class's share of the "
        f"{config.data.tested_on}, {majority:.1%}: always giving that class would do "
        f"{well}. Try {_list(_remedies(config))}."
    )


def tell_warned(names: Sequence[str], runs: int) -> str:
    """Return which of several runs have ended near the majority class.

    Parameters
    ----------
    names : Sequence[str]
        Names of the runs that `tell_chance` warns of, at least one.
    runs : int
        The number of runs.
    """
    which = ", ".join(map(printable, map(str, shorten(names))))
    return (
        "The accuracy is within two points of the majority class's share, or below, "
        f"in {len(names)} of {counted(runs, 'run')}: {which}. The report of each says "
        "what to try."
    )


def _remedies(config: RunConfig) -> list[str]:
    clients = config.clients
    found = ["more rounds"]
    if _is_dealt_by_alpha(config):
        found.append("a larger clients.alpha")
    if clients.per_round < clients.count or not clients.count:
        found.append("more clients a round (clients.per-round)")
    if _is_foreign(config):
        found.append("a model of the Hub in place of the embedded one (model.name)")
    return found


def _is_foreign(config: RunConfig) -> bool:
    """Return whether the embedded model is to learn from text that it never saw."""
    return config.model.name == _EMBEDDED and config.data.name != _EMBEDDED_TEXT


def _is_dealt_by_alpha(config: RunConfig) -> bool:
    return not config.data.is_own and config.clients.partitioner in _OF_LABELS


def _list(parts: list[str]) -> str:
    *others, last = parts
    return f"{', '.join(others)} or {last}" if others else last
