"""The selection of an update's values, if only a share of them is sent."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slora_flwr.common.tensors import State

Positions = NDArray[np.int64]


def weigh_by_product(
    changes: Mapping[str, Tensor], factors: Mapping[str, Tensor]
) -> State:
    """Weigh LoRA's entries by their effect on B·A: FedSRD (arXiv 2510.04601).

    A change of B_ij changes row i of B·A by |dB_ij|·‖A_j‖, with A_j the j-th row of A.
    A change of A_jk changes column k by ‖B_j‖·|dA_jk|, with B_j the j-th column of B.
    All other entries are weighed by magnitude.

    Parameters
    ----------
    changes : Mapping[str, Tensor]
        Changes of `<module>.lora_A`, (rank, in), of `<module>.lora_B`, (out, rank), or
        of both; and of the head.
    factors : Mapping[str, Tensor]
        Both factors after the client's training.
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
    """Choose the entries of largest weight, separately for adapter and head.

    Parameters
    ----------
    weights : Mapping[str, Tensor]
        Each entry's weight, not negative.
    parts : Sequence[int]
        How many entries to choose of the adapter's, and of the head's.
    head : int
        Number of entries at the end that belong to the head.

    Returns
    -------
    NDArray[np.int64]
        Ascending positions in the flattened state.
    """
    flat = np.concatenate([tensor.reshape(-1).numpy() for tensor in weights.values()])
    cut = len(flat) - head
    of_adapter = _largest(flat[:cut], parts[0])
    return np.concatenate([of_adapter, _largest(flat[cut:], parts[1]) + cut])


def _largest(weights: NDArray[np.float32], count: int) -> Positions:
    """Return the ascending positions of the largest weights; ties go to the first."""
    if not count:
        return np.empty(0, dtype=np.int64)
    start = len(weights) - count
    least = np.partition(weights, start)[start]
    chosen = np.flatnonzero(weights >= least)
    if len(chosen) > count:
        equal = chosen[weights[chosen] == least]
        chosen = np.setdiff1d(chosen, equal[count - len(chosen) :], assume_unique=True)
    return chosen
