"""Snapshots: facts and tensors from which an object is restored."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slora_flwr.common.tensors import State


@dataclass
class Snapshot:
    """The facts and tensors from which an object is restored.

    Attributes
    ----------
    facts : dict[str, Any]
        Values for JSON, which turns tuples into lists and keys into text.
    tensors : State
        Tensors of any dtype.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    tensors: State = field(default_factory=dict)

    @classmethod
    def join(cls, parts: Mapping[str, "Snapshot"]) -> "Snapshot":
        """Return one snapshot that joins several."""
        return cls(
            {name: part.facts for name, part in parts.items()},
            {
                f"{p}/{n}": t
                for p, part in parts.items()
                for n, t in part.tensors.items()
            },
        )

    def part(self, name: str) -> "Snapshot":
        """Return one part."""
        start = f"{name}/"
        tensors = {
            n.removeprefix(start): t
            for n, t in self.tensors.items()
            if n.startswith(start)
        }
        return Snapshot(self.facts[name], tensors)


def to_tensor(data: bytes) -> Tensor:
    """Return bytes as a uint8 tensor."""
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def to_bytes(tensor: Tensor) -> bytes:
    """Return a tensor's bytes."""
    return tensor.numpy().tobytes()
