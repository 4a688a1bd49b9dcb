"""Federated fine-tuning of transformers on Flower: SLoRA and its peers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slora_flwr.adapters.base import Adapter, require_targets
    from slora_flwr.adapters.bottleneck import apply_bottlenecks
    from slora_flwr.adapters.export import apply_base_patch, load_adapter
    from slora_flwr.adapters.loading import Loading
    from slora_flwr.adapters.peft_layers import wrap_peft, write_peft
    from slora_flwr.aggregation.base import Aggregator
    from slora_flwr.aggregation.mean import Mean
    from slora_flwr.aggregation.stack import Stack
    from slora_flwr.backbone.base_weights import BaseWeights
    from slora_flwr.backbone.load import Backbone
    from slora_flwr.common.tensors import State
    from slora_flwr.config import ConfigError, RunConfig
    from slora_flwr.config.methods import Method, PhaseRow
    from slora_flwr.result import Result, train
    from slora_flwr.runs.events import ClientRecord, RecordedRound
    from slora_flwr.runs.ledger import Entry
    from slora_flwr.runs.reader import Failure, RecordedRun, RunError
    from slora_flwr.tasks.classification import Prediction

__version__ = "0.1.0"

# Where each public name lives; its module is imported once it is asked for, since torch
# and transformers take seconds.
_PLACES = {
    "Adapter": "adapters.base",
    "Aggregator": "aggregation.base",
    "Backbone": "backbone.load",
    "BaseWeights": "backbone.base_weights",
    "ClientRecord": "runs.events",
    "ConfigError": "config",
    "Entry": "runs.ledger",
    "Failure": "runs.reader",
    "Loading": "adapters.loading",
    "Mean": "aggregation.mean",
    "Method": "config.methods",
    "PhaseRow": "config.methods",
    "Prediction": "tasks.classification",
    "RecordedRound": "runs.events",
    "RecordedRun": "runs.reader",
    "Result": "result",
    "RunConfig": "config",
    "RunError": "runs.reader",
    "Stack": "aggregation.stack",
    "State": "common.tensors",
    "apply_base_patch": "adapters.export",
    "apply_bottlenecks": "adapters.bottleneck",
    "load_adapter": "adapters.export",
    "require_targets": "adapters.base",
    "train": "result",
    "wrap_peft": "adapters.peft_layers",
    "write_peft": "adapters.peft_layers",
}

__all__ = [
    "Adapter",
    "Aggregator",
    "Backbone",
    "BaseWeights",
    "ClientRecord",
    "ConfigError",
    "Entry",
    "Failure",
    "Loading",
    "Mean",
    "Method",
    "PhaseRow",
    "Prediction",
    "RecordedRound",
    "RecordedRun",
    "Result",
    "RunConfig",
    "RunError",
    "Stack",
    "State",
    "__version__",
    "apply_base_patch",
    "apply_bottlenecks",
    "load_adapter",
    "require_targets",
    "train",
    "wrap_peft",
    "write_peft",
]


def __getattr__(name: str) -> Any:
    """Return what is public, from its module."""
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
