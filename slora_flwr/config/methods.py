"""The table of methods: the phases of each, their adapters and aggregators.

A row names its adapters and aggregators. `ADAPTERS` and `AGGREGATORS` locate them as
entry points do, because this package cannot import theirs. Other packages add their own
by entry points of the groups `slora_flwr.methods`, `slora_flwr.adapters` and
`slora_flwr.aggregators`, which are loaded when first used.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from slora_flwr.common.text import printable
from slora_flwr.config.errors import ConfigError


@dataclass(frozen=True)
class PhaseRow:
    """One phase of a method.

    Attributes
    ----------
    adapter : str
        What the phase trains.
    aggregator : str
        How the clients' updates are combined; empty for `lora.aggregator`.
    """

    adapter: str
    aggregator: str = "fedavg"


@dataclass(frozen=True)
class Method:
    """A method: its phases in order, one line of help, and the paper it is from.

    It has one phase, or two of different adapters.
    """

    phases: tuple[PhaseRow, ...]
    help: str
    paper: str = ""

    def __post_init__(self) -> None:
        adapters = [row.adapter for row in self.phases]
        if len(adapters) not in (1, 2) or len({*adapters}) < len(adapters):
            raise ValueError(
                f"a method's phases are {adapters}; allowed: one, or two of different "
                "adapters"
            )

    @property
    def aggregator(self) -> str:
        """The last phase's aggregator; empty for the config's."""
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

# Methods to compare the others with; the first should be the most accurate.
REFERENCES = ("fft", "lora")

ADAPTERS = {
    "full": "slora_flwr.adapters.full:FullAdapter",
    "bias": "slora_flwr.adapters.full:BiasAdapter",
    "head": "slora_flwr.adapters.head:HeadAdapter",
    "sparse": "slora_flwr.adapters.sparse:SparseAdapter",
    "lora": "slora_flwr.adapters.lora:LoraAdapter",
    "houlsby": "slora_flwr.adapters.bottleneck:HoulsbyAdapter",
    "pfeiffer": "slora_flwr.adapters.bottleneck:PfeifferAdapter",
}

# The config section that an adapter reads besides `train`. Adapters state it too, but
# reading it there imports torch, which reports do without.
_SECTIONS = {
    "sparse": "sparse",
    "lora": "lora",
    "houlsby": "bottleneck",
    "pfeiffer": "bottleneck",
}
# This package's adapters that act on the matrices of `lora.targets`.
_ON_TARGETS = ("sparse", "lora")

AGGREGATORS = {
    "fedavg": "slora_flwr.aggregation.base:PlainAverage",
    "ffa": "slora_flwr.aggregation.frozen_factor:FrozenFactor",
    "alternate": "slora_flwr.aggregation.frozen_factor:AlternatingFactors",
    "exact": "slora_flwr.aggregation.lora_products:ExactProducts",
    "flexlora": "slora_flwr.aggregation.lora_products:FactoredProducts",
}


# The base class of the entry points of a kind; those of methods are a `Method`.
BASES = {
    "adapters": "slora_flwr.adapters.base:Adapter",
    "aggregators": "slora_flwr.aggregation.base:Aggregator",
}

_OWN: Mapping[str, Mapping[str, Any]] = {
    "methods": METHODS,
    "adapters": ADAPTERS,
    "aggregators": AGGREGATORS,
}


class _Methods(Mapping[str, Method]):
    """All methods by name; those from outside are loaded when they are looked up."""

    def __getitem__(self, name: str) -> Method:
        outside = _outside("methods")  # first: it refuses names that are taken
        if name in METHODS:
            return METHODS[name]
        found: Method = _load("methods", outside[name])
        return found

    def __iter__(self) -> Iterator[str]:
        return iter((*METHODS, *_outside("methods")))

    def __len__(self) -> int:
        return len(METHODS) + len(_outside("methods"))


def list_methods() -> Mapping[str, Method]:
    """Return all methods by name, those from outside last.

    A method from outside is loaded when it is looked up. This raises ConfigError if
    loading fails or the name is taken.
    """
    return _Methods()


def list_aggregators() -> tuple[str, ...]:
    """Return the names of all aggregators, those from outside last."""
    return (*AGGREGATORS, *_outside("aggregators"))


@cache
def find_adapter(name: str) -> Any:
    """Return the class of a phase's adapter, a `slora_flwr.adapters.base.Adapter`.

    Raises
    ------
    ConfigError
        If no adapter has that name, or it cannot be loaded.
    """
    return _find("adapters", name)


@cache
def find_aggregator(name: str) -> Any:
    """Return the class of a phase's aggregator, an `aggregation.base.Aggregator`.

    Raises
    ------
    ConfigError
        If no aggregator has that name, or it cannot be loaded.
    """
    return _find("aggregators", name)


def find_outside_files(**used: Iterable[str]) -> tuple[Path, ...]:
    """Return the source files of the outside packages that define some names.

    Parameters
    ----------
    **used : Iterable[str]
        The names, by kind: `methods`, `adapters`, `aggregators`.
    """
    points = (_outside(kind).get(n) for kind, names in used.items() for n in names)
    files: list[Path] = []
    for package in sorted({p.module.partition(".")[0] for p in points if p}):
        module = import_module(package)
        # A package has a path, a single file has none.
        folders = [Path(folder) for folder in getattr(module, "__path__", ())]
        found = sorted(path for folder in folders for path in folder.rglob("*.py"))
        files += found if folders else [Path(str(module.__file__))]
    return tuple(files)


def section_of(adapter: str) -> str:
    """Return an adapter's config section; empty if it reads only `train`.

    This needs torch only for adapters from outside.
    """
    if adapter in ADAPTERS:
        return _SECTIONS.get(adapter, "")
    return str(find_adapter(adapter).section)


def acts_on_targets(adapter: str) -> bool:
    """Return whether an adapter may act on the matrices that `lora.targets` names."""
    return adapter in _ON_TARGETS or adapter not in ADAPTERS


def _find(kind: str, name: str) -> Any:
    own, outside = _OWN[kind], _outside(kind)
    if name in own:
        return EntryPoint(name, own[name], kind).load()
    if name not in outside:
        known = ", ".join((*own, *outside))
        raise ConfigError(
            f"{printable(repr(name))} is none of the {kind}; known: {known}"
        )
    return _load(kind, outside[name])


def _load(kind: str, point: EntryPoint) -> Any:
    """Load an entry point.

    Raises
    ------
    ConfigError
        If it cannot be loaded, or is not of its group's type.
    """
    base = BASES.get(kind)
    wanted = f"a subclass of {base}" if base else f"a {__name__}:Method"
    given = f"{_describe(point)}, is {point.value!r}"
    try:
        found = point.load()
    except Exception as error:  # a package from outside may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{given}; allowed: {wanted} ({reason})") from error
    if base:
        parent = EntryPoint("", base, kind).load()
        fits = isinstance(found, type) and issubclass(found, parent)
    else:
        fits = isinstance(found, Method)
    if not fits:
        raise ConfigError(f"{given}; allowed: {wanted}")
    return found


@cache
def _outside(kind: str) -> dict[str, EntryPoint]:
    """Return the entry points of a kind by name, in the order of their names.

    Raises
    ------
    ConfigError
        If a name is taken.
    """
    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=f"slora_flwr.{kind}")):
        if point.name in _OWN[kind]:
            raise ConfigError(
                f"{_describe(point)}, has the name of one of slora-flwr's own; "
                "allowed: another name"
            )
        if point.name in found:
            raise ConfigError(
                f"{_describe(point)}, has the name of {_describe(found[point.name])}; "
                "allowed: one of the two packages, or another name"
            )
        found[point.name] = point
    return found


def _describe(point: EntryPoint) -> str:
    package = f"{point.dist.name} {point.dist.version}" if point.dist else "no package"
    return f"entry point {point.name!r} of {point.group}, from {package}"
