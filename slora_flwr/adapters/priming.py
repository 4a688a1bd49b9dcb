"""Priming: LoRA's factors from a truncated SVD, and the check of a handoff.

SLoRA (arXiv 2308.06522), for each target matrix: the delta D = W - W_0 of the sparse
phase has the truncated SVD D ~ U S Vᵀ, and LoRA starts at s·B·A = U S Vᵀ. Three bases:

- `w0`: base W_0. The result is a plain adapter for the public checkpoint. The part of D
  beyond rank r is lost, so the function jumps.
- `residual`: base W_0 + D - s·B·A. The function is continuous and nothing is lost.
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


class HandoffError(RuntimeError):
    """The result of a handoff is not what its base and factors intend."""


def check_handoff(
    effective: Tensor,
    intended: Tensor,
    b: Tensor,
    base: str,
    name: str,
    rounding: float = 0.0,
) -> None:
    """Check that a handoff has primed one matrix as intended.

    Parameters
    ----------
    effective : Tensor
        What the low-rank phase starts with, (m, n): s·B·A, or that plus the difference
        between the base and W_0.
    intended : Tensor
        What it should be, (m, n): the delta's best rank-r approximation, or the delta.
    b : Tensor
        LoRA's B, (m, rank).
    base, name : str
        The base and the matrix, for the message.
    rounding : float
        Largest error of an entry due to the weight's data type.

    Raises
    ------
    HandoffError
        If the two differ by more than float32 rounding, or a primed B is zero although
        the delta is not.
    """
    scale = float(intended.abs().max())
    error = float((effective - intended).abs().max())
    if not math.isfinite(error) or error > 1e-5 * max(scale, 1e-3) + rounding:
        raise HandoffError(
            f"after the handoff {name} is off by {error:.3g} from what base {base} "
            f"intends, whose largest entry is {scale:.3g}"
        )
    if base != "warm-start" and scale > 0 and not bool(b.any()):
        raise HandoffError(f"after the handoff B of {name} is zero: nothing was primed")
