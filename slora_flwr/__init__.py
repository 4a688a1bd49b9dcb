"""Federated fine-tuning of transformers on Flower: SLoRA and its peers."""

from typing import Any

__version__ = "0.1.0"

__all__ = ["__version__", "apply_base_patch", "load_adapter"]


def __getattr__(name: str) -> Any:
    """Return a function that loads exports; it takes torch once it is asked for."""
    if name in __all__:
        from slora_flwr.adapters import export

        return getattr(export, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
