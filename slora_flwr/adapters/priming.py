"""Priming: LoRA's factors from a truncated SVD, and the check of a handoff.

SLoRA (arXiv 2308.06522), for each target matrix: the delta D = W - W_0 of the sparse
phase has the truncated SVD D ~ U S Vᵀ, and LoRA starts at s·B·A = U S Vᵀ. Three bases:

- `w0`: base W_0. The result is a plain adapter for the public checkpoint. The part of D
  beyond rank r is lost, so the function jumps.
- `residual`: base W_0 + D - s·B·A, its last term as factors. The function is
  continuous and nothing is lost.
- `warm-start`, a control: base W_0 + D and LoRA's own initialisation, B = 0.
"""

import math

import numpy as np
import torch
from torch import Tensor

from slora_flwr.common.svd import TruncatedSvd


def prime(svd: TruncatedSvd, scaling: float, factors: str) -> tuple[Tensor, Tensor]:
    """Return LoRA's factors for a truncated SVD, so that s·B·A = u · diag(S) · vt.

    Parameters
    ----------
    svd : TruncatedSvd
        SVD of the delta.
    scaling : float
        LoRA's s; the product B·A is divided by it.
    factors : str
        `balanced` puts the root of S / s into both factors; `b` puts S / s into B and
        leaves A with orthonormal rows.

    Returns
    -------
    a, b : Tensor
        float32, shapes (rank, n) and (m, rank).
    """
    weights = svd.s / scaling
    if factors == "balanced":
        root = np.sqrt(weights)
        # A component of zero weight keeps its direction in A, as in LoRA's own
        # initialisation: if both sides were zero, neither would ever get a gradient.
        live = weights > 1e-12 * weights[0]
        a = np.where(live, root, 1.0)[:, None] * svd.vt
        b = svd.u * np.where(live, root, 0.0)
    elif factors == "b":
        a, b = svd.vt, svd.u * weights
    else:
        raise ValueError(f"factors is {factors!r}; allowed: balanced, b")
    return (
        torch.from_numpy(np.ascontiguousarray(a)).float(),
        torch.from_numpy(np.ascontiguousarray(b)).float(),
    )


# Rows of a matrix that are checked at a time.
ROWS = 256


class HandoffError(RuntimeError):
    """The result of a handoff is not what its base and factors intend."""


def check_primed(
    a: Tensor, b: Tensor, scaling: float, svd: TruncatedSvd, base: str, name: str
) -> None:
    """Check that s·B·A of one matrix is the delta's best rank-r approximation.

    Parameters
    ----------
    a, b : Tensor
        LoRA's factors, (rank, n) and (m, rank).
    scaling : float
        LoRA's s.
    svd : TruncatedSvd
        SVD of the delta.
    base, name : str
        The base and the matrix, for the message.

    Raises
    ------
    HandoffError
        If the two differ by more than float32 rounding, or B is zero although the delta
        is not.
    """
    left, vt = torch.from_numpy(svd.u * svd.s).float(), torch.from_numpy(svd.vt).float()
    if (b.shape, a.shape) != (left.shape, vt.shape):
        _refuse(math.inf, _largest(left), 0.0, base, name)
    largest, error = 0.0, 0.0
    # A few rows at a time: a dense product would be as large as the weight.
    for rows, kept_rows in zip(b.split(ROWS), left.split(ROWS), strict=True):
        kept = kept_rows @ vt
        largest = max(largest, _largest(kept))
        error = max(error, _error((scaling * rows) @ a, kept))
    _refuse(error, largest, 1e-5 * max(largest, 1e-3), base, name)
    if svd.s.any() and not bool(b.any()):
        raise HandoffError(f"after the handoff B of {name} is zero: nothing was primed")


def check_equal(found: Tensor, intended: Tensor, base: str, name: str) -> None:
    """Check that a handoff has made one tensor as intended, bit for bit.

    Parameters
    ----------
    found, intended : Tensor
        What the low-rank phase starts with, and what it should.
    base, name : str
        The base and the matrix, for the message.

    Raises
    ------
    HandoffError
        If the two differ.
    """
    _refuse(_error(found, intended), _largest(intended), 0.0, base, name)


def _refuse(error: float, largest: float, within: float, base: str, name: str) -> None:
    """Raise HandoffError if an error is too large."""
    if error > within:
        raise HandoffError(
            f"after the handoff {name} is off by {error:.3g} from what base {base} "
            f"intends, whose largest entry is {largest:.3g}"
        )


def _error(found: Tensor, intended: Tensor) -> float:
    """Return the largest difference; infinity for NaN or another shape."""
    if found.shape != intended.shape:
        return math.inf
    error = _largest(found - intended)
    return math.inf if math.isnan(error) else error


def _largest(tensor: Tensor) -> float:
    """Return the largest magnitude in a tensor, or NaN."""
    return float(torch.linalg.vector_norm(tensor, math.inf)) if tensor.numel() else 0.0
