"""Snapshots: facts and tensors that an object is made from again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slora_flwr.common.tensors import State


@dataclass
class Snapshot:
    """What an object is made from again.

    Attributes
    ----------
    facts : dict[str, Any]
        What JSON can hold. It turns tuples into lists, and keys into text.
    tensors : State
        Of any dtypes.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    tensors: State = field(default_factory=dict)

    @classmethod
    def join(cls, parts: Mapping[str, "Snapshot"]) -> "Snapshot":
        """Make one snapshot of several."""
        return cls(
            {name: part.facts for name, part in parts.items()},
            {
                f"{p}/{n}": t
                for p, part in parts.items()
                for n, t in part.tensors.items()
            },
        )

    def part(self, name: str) -> "Snapshot":
        """Give one of those that were joined."""
        start = f"{name}/"
        tensors = {
            n.removeprefix(start): t
            for n, t in self.tensors.items()
            if n.startswith(start)
        }
        return Snapshot(self.facts[name], tensors)


def to_tensor(data: bytes) -> Tensor:
    """Give bytes as a tensor, uint8."""
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def to_bytes(tensor: Tensor) -> bytes:
    """Give the bytes back."""
    return tensor.numpy().tobytes()
