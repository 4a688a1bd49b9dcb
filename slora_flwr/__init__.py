"""Federated fine-tuning of transformers on Flower: SLoRA and its peers."""

from typing import Any

__version__ = "0.1.0"

__all__ = ["__version__", "apply_base_patch"]


def __getattr__(name: str) -> Any:
    """Return `apply_base_patch`, which takes torch, once it is asked for."""
    if name == "apply_base_patch":
        from slora_flwr.adapters.export import apply_base_patch

        return apply_base_patch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
