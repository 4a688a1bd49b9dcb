"""The table of methods: the phases of each, their adapters and aggregators.

A row names its adapters and aggregators; `ADAPTERS` and `AGGREGATORS` say where each
one is, as an entry point does, because their rooms stand above this one. Packages from
outside add theirs by entry points of the groups `slora_flwr.methods`,
`slora_flwr.adapters` and `slora_flwr.aggregators`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any


@dataclass(frozen=True)
class PhaseRow:
    """One phase of a method.

    Attributes
    ----------
    adapter : str
        What the phase trains.
    aggregator : str
        What becomes of the clients' updates; empty for what `lora.aggregator` says.
    """

    adapter: str
    aggregator: str = "fedavg"


@dataclass(frozen=True)
class Method:
    """A method: its phases in order, one line of help, and the paper it is from."""

    phases: tuple[PhaseRow, ...]
    help: str
    paper: str = ""

    @property
    def aggregator(self) -> str:
        """The aggregator of its own, `fedavg` without one; empty: the config's."""
        return self.phases[-1].aggregator


METHODS = {
    "slora": Method(
        (PhaseRow("sparse"), PhaseRow("lora", "")),
        "a sparse phase, then LoRA primed by what it learned",
        "arXiv 2308.06522",
    ),
    "sft": Method(
        (PhaseRow("sparse"),), "sparse fine-tuning alone", "arXiv 2308.06522"
    ),
    "lora": Method((PhaseRow("lora", ""),), "LoRA", "arXiv 2106.09685"),
    "ffa-lora": Method(
        (PhaseRow("lora", "ffa"),), "LoRA with a frozen A", "arXiv 2403.12313"
    ),
    "alternate-lora": Method(
        (PhaseRow("lora", "alternate"),),
        "LoRA that trains A and B in turn (RoLoRA)",
        "arXiv 2409.02346",
    ),
    "fedex-lora": Method(
        (PhaseRow("lora", "exact"),),
        "LoRA whose products are averaged exactly",
        "arXiv 2410.09432",
    ),
    "flexlora": Method(
        (PhaseRow("lora", "flexlora"),),
        "LoRA whose mean product is factored anew each round",
        "arXiv 2402.11505",
    ),
    "head-lora": Method(
        (PhaseRow("head"), PhaseRow("lora", "")),
        "the head alone, then LoRA: slora's control",
    ),
    "fft": Method((PhaseRow("full"),), "full fine-tuning", "arXiv 1602.05629"),
    "bitfit": Method((PhaseRow("bias"),), "bias terms", "arXiv 2106.10199"),
    "houlsby": Method(
        (PhaseRow("houlsby"),), "two bottlenecks a block", "arXiv 1902.00751"
    ),
    "pfeiffer": Method(
        (PhaseRow("pfeiffer"),), "one bottleneck a block", "arXiv 2005.00247"
    ),
    "head": Method((PhaseRow("head"),), "the head alone"),
}

ADAPTERS = {
    "full": "slora_flwr.adapters.full:FullAdapter",
    "bias": "slora_flwr.adapters.full:BiasAdapter",
    "head": "slora_flwr.adapters.head:HeadAdapter",
    "sparse": "slora_flwr.adapters.sparse:SparseAdapter",
    "lora": "slora_flwr.adapters.lora:LoraAdapter",
    "houlsby": "slora_flwr.adapters.bottleneck:HoulsbyAdapter",
    "pfeiffer": "slora_flwr.adapters.bottleneck:PfeifferAdapter",
}

AGGREGATORS = {
    "fedavg": "slora_flwr.aggregation.base:PlainAverage",
    "ffa": "slora_flwr.aggregation.frozen_factor:FrozenFactor",
    "alternate": "slora_flwr.aggregation.frozen_factor:AlternatingFactors",
    "exact": "slora_flwr.aggregation.lora_products:ExactProducts",
    "flexlora": "slora_flwr.aggregation.lora_products:FactoredProducts",
}


@cache
def list_methods() -> Mapping[str, Method]:
    """Return all methods by name, those from outside last."""
    return METHODS | {point.name: point.load() for point in _outside("methods")}


@cache
def list_aggregators() -> tuple[str, ...]:
    """Return the names of all aggregators, those from outside last."""
    return (*AGGREGATORS, *(point.name for point in _outside("aggregators")))


@cache
def find_adapter(name: str) -> Any:
    """Return the class of a phase's adapter, a `slora_flwr.adapters.base.Adapter`.

    Raises
    ------
    LookupError
        If no adapter has that name.
    """
    return _find("adapters", ADAPTERS, name)


@cache
def find_aggregator(name: str) -> Any:
    """Return the class of a phase's aggregator, an `aggregation.base.Aggregator`.

    Raises
    ------
    LookupError
        If no aggregator has that name.
    """
    return _find("aggregators", AGGREGATORS, name)


def _find(kind: str, own: Mapping[str, str], name: str) -> Any:
    if name in own:
        module, _, attribute = own[name].partition(":")
        return getattr(import_module(module), attribute)
    found = {point.name: point for point in _outside(kind)}
    if name not in found:
        known = ", ".join((*own, *found))
        raise LookupError(f"{name!r} is none of the {kind}; known: {known}")
    return found[name].load()


def _outside(kind: str) -> list[EntryPoint]:
    """Return the entry points of a kind, in the order of their names."""
    points = {p.name: p for p in entry_points(group=f"slora_flwr.{kind}")}
    return [points[name] for name in sorted(points)]
