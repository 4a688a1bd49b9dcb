"""Truncated singular value decompositions of sparse, dense and factored matrices."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

# If the smaller side is at most this, LAPACK is fast; ARPACK cannot compute all ranks.
DENSE_SIDE = 128


@dataclass(frozen=True)
class TruncatedSvd:
    """D ~ u · diag(s) · vt: u (m, r), s (r,) descending, vt (r, n), float64.

    `energy` is the share of D's squared Frobenius norm that rank r keeps.
    """

    u: NDArray[np.float64]
    s: NDArray[np.float64]
    vt: NDArray[np.float64]
    energy: float


def truncated_svd(
    positions: NDArray[np.int64],
    values: NDArray[np.float64],
    shape: tuple[int, int],
    rank: int,
) -> TruncatedSvd:
    """Factor a sparse matrix by Lanczos (ARPACK), or densely if it is small.

    Parameters
    ----------
    positions : NDArray[np.int64]
        Row-major positions of the entries, shape (k,).
    values : NDArray[np.float64]
        Their values, shape (k,).
    shape : tuple of int
        (m, n).
    rank : int
        Number of singular triplets; at most min(m, n).

    Raises
    ------
    ValueError
        If rank is more than min(m, n).
    """
    side = min(shape)
    if rank > side:
        raise ValueError(f"rank is {rank}; allowed: up to {side} for shape {shape}")
    values = values.astype(np.float64)
    total = float(values @ values)
    # Empty rows and columns do not matter. A mask of whole rows or columns leaves a
    # thin dense matrix, whose SVD is exact and fast.
    rows, at_row = np.unique(positions // shape[1], return_inverse=True)
    columns, at_column = np.unique(positions % shape[1], return_inverse=True)
    thin = (len(rows), len(columns))
    if min(thin) <= DENSE_SIDE or 2 * rank >= min(thin) or total == 0.0:
        dense = np.zeros(thin)
        dense[at_row, at_column] = values
        u, s, vt = np.linalg.svd(dense, full_matrices=False)
    else:
        from scipy import sparse

        matrix = sparse.csr_array((values, (at_row, at_column)), shape=thin)
        u, s, vt = _lanczos(matrix, rank)
    kept = min(rank, len(s))
    u = _spread(u[:, :kept], rows, shape[0], rank)
    vt = _spread(vt[:kept].T, columns, shape[1], rank).T
    return _finish(u, s, vt, total)


def truncated_dense(matrix: NDArray[np.float64], rank: int) -> TruncatedSvd:
    """Factor a dense matrix by Lanczos (ARPACK), or fully if it is small.

    Parameters
    ----------
    matrix : NDArray[np.float64]
        Shape (m, n).
    rank : int
        Number of singular triplets; at most min(m, n).
    """
    total = float(np.vdot(matrix, matrix))
    if min(matrix.shape) <= DENSE_SIDE or 2 * rank >= min(matrix.shape) or not total:
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, vt = _lanczos(matrix, rank)
    return _finish(u[:, :rank], s, vt[:rank], total)


def truncated_product(left: Tensor, right: Tensor, rank: int) -> TruncatedSvd:
    """Factor a product of thin matrices without forming it.

    With left = Q_1 R_1 and rightᵀ = Q_2 R_2, the SVD of left · right is that of the
    small R_1 R_2ᵀ, rotated by Q_1 and Q_2.

    Parameters
    ----------
    left, right : Tensor
        float64, shapes (m, k) and (k, n).
    rank : int
        Number of singular triplets; at most min(m, n).
    """
    q1, r1 = np.linalg.qr(left.numpy())
    q2, r2 = np.linalg.qr(right.numpy().T)
    u, s, vt = np.linalg.svd(r1 @ r2.T, full_matrices=False)
    kept = min(rank, len(s))
    m, n = np.arange(left.shape[0]), np.arange(right.shape[1])
    u = _spread(q1 @ u[:, :kept], m, len(m), rank)
    vt = _spread(q2 @ vt[:kept].T, n, len(n), rank).T
    return _finish(u, s, vt, float(s @ s))


def _finish(
    u: NDArray[np.float64],
    s: NDArray[np.float64],
    vt: NDArray[np.float64],
    total: float,
) -> TruncatedSvd:
    """Truncate the singular values, fix the signs and compute the energy."""
    rank = len(vt)
    s = np.concatenate([s[:rank], np.zeros(max(0, rank - len(s)))])
    # The sign of a singular pair is arbitrary. Make the largest entry of each row of vt
    # positive, so that two solvers agree.
    signs = np.sign(vt[np.arange(rank), np.abs(vt).argmax(axis=1)])
    signs[signs == 0] = 1.0
    energy = float(s @ s) / total if total else 0.0
    return TruncatedSvd(u * signs, s, vt * signs[:, None], energy)


def _lanczos(
    matrix: Any, rank: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    from scipy.sparse.linalg import svds

    # A fixed start makes the factors reproducible; its direction does not matter.
    start = np.random.Philox(key=rank).random_raw(min(matrix.shape)).astype(np.float64)
    u, s, vt = svds(matrix, k=rank, v0=start / 2.0**63 - 1.0)
    return u[:, ::-1], s[::-1], vt[::-1]


def _spread(
    vectors: NDArray[np.float64], lines: NDArray[np.int64], size: int, count: int
) -> NDArray[np.float64]:
    """Extend orthonormal columns to `size` rows and `count` orthonormal columns.

    Row i of `vectors` becomes row `lines[i]` of the result. Added columns are
    orthogonal to the given ones.

    Returns
    -------
    NDArray[np.float64]
        Shape (size, count).
    """
    full = np.zeros((size, vectors.shape[1]))
    full[lines] = vectors
    missing = count - vectors.shape[1]
    if not missing:
        return full
    words = np.random.Philox(key=count).random_raw(size * missing).astype(np.float64)
    others = (words / 2.0**63 - 1.0).reshape(size, missing)
    basis, _ = np.linalg.qr(np.concatenate([full, others], axis=1))
    return np.concatenate([full, basis[:, -missing:]], axis=1)
