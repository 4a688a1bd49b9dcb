"""Federated fine-tuning of transformers on Flower: SLoRA and its peers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slora_flwr.adapters.base import Adapter
    from slora_flwr.adapters.bottleneck import apply_bottlenecks
    from slora_flwr.adapters.export import apply_base_patch, load_adapter
    from slora_flwr.aggregation.base import Aggregator
    from slora_flwr.config import ConfigError
    from slora_flwr.config.methods import Method, PhaseRow
    from slora_flwr.result import Result, train
    from slora_flwr.runs.events import ClientRecord, RecordedRound
    from slora_flwr.runs.ledger import Entry
    from slora_flwr.runs.reader import Failure, RecordedRun, RunError
    from slora_flwr.server.predict import Prediction

__version__ = "0.1.0"

# Where each public name lives; its module is imported once it is asked for, since torch
# and transformers take seconds.
_PLACES = {
    "Adapter": "adapters.base",
    "Aggregator": "aggregation.base",
    "ClientRecord": "runs.events",
    "ConfigError": "config",
    "Entry": "runs.ledger",
    "Failure": "runs.reader",
    "Method": "config.methods",
    "PhaseRow": "config.methods",
    "Prediction": "server.predict",
    "RecordedRound": "runs.events",
    "RecordedRun": "runs.reader",
    "Result": "result",
    "RunError": "runs.reader",
    "apply_base_patch": "adapters.export",
    "apply_bottlenecks": "adapters.bottleneck",
    "load_adapter": "adapters.export",
    "train": "result",
}

__all__ = [
    "Adapter",
    "Aggregator",
    "ClientRecord",
    "ConfigError",
    "Entry",
    "Failure",
    "Method",
    "PhaseRow",
    "Prediction",
    "RecordedRound",
    "RecordedRun",
    "Result",
    "RunError",
    "__version__",
    "apply_base_patch",
    "apply_bottlenecks",
    "load_adapter",
    "train",
]


def __getattr__(name: str) -> Any:
    """Return what is public, from its module."""
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
