"""Which values of an update travel where only a share of them does."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slora_flwr.common.tensors import State

Positions = NDArray[np.int64]


def weigh_by_product(
    changes: Mapping[str, Tensor], factors: Mapping[str, Tensor]
) -> State:
    """Weigh LoRA's entries by what they do to B·A: FedSRD (arXiv 2510.04601).

    A change of B_ij moves row i of B·A by |dB_ij|·‖A_j‖, with A_j the j-th row of A;
    one of A_jk moves column k by ‖B_j‖·|dA_jk|, with B_j the j-th column of B. All else
    counts by magnitude.

    Parameters
    ----------
    changes : Mapping[str, Tensor]
        `<module>.lora_A`, (rank, in), and `<module>.lora_B`, (out, rank), or one of
        them; the head.
    factors : Mapping[str, Tensor]
        Both factors, as the client has trained them.
    """
    weights = {name: tensor.abs() for name, tensor in changes.items()}
    for name, tensor in weights.items():
        module, _, part = name.rpartition(".")
        if part == "lora_A":
            tensor.mul_(factors[f"{module}.lora_B"].norm(dim=0)[:, None])
        elif part == "lora_B":
            tensor.mul_(factors[f"{module}.lora_A"].norm(dim=1)[None, :])
    return weights


def choose(weights: Mapping[str, Tensor], parts: Sequence[int], head: int) -> Positions:
    """Choose the entries of largest weight, of the adapter's and of the head's.

    Parameters
    ----------
    weights : Mapping[str, Tensor]
        Of each entry, not negative.
    parts : Sequence[int]
        How many of the adapter's entries, and how many of the head's.
    head : int
        How many entries at the end are the head's.

    Returns
    -------
    NDArray[np.int64]
        Positions in the state as one vector, ascending.
    """
    flat = np.concatenate([tensor.reshape(-1).numpy() for tensor in weights.values()])
    cut = len(flat) - head
    of_adapter = _largest(flat[:cut], parts[0])
    return np.concatenate([of_adapter, _largest(flat[cut:], parts[1]) + cut])


def _largest(weights: NDArray[np.float32], count: int) -> Positions:
    """Give the positions of the largest, ascending; of equal ones the first."""
    if not count:
        return np.empty(0, dtype=np.int64)
    start = len(weights) - count
    least = np.partition(weights, start)[start]
    chosen = np.flatnonzero(weights >= least)
    if len(chosen) > count:
        equal = chosen[weights[chosen] == least]
        chosen = np.setdiff1d(chosen, equal[count - len(chosen) :], assume_unique=True)
    return chosen
