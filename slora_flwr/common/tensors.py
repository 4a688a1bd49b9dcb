"""The type of a state: named tensors in a stable order."""

from torch import Tensor

State = dict[str, Tensor]
