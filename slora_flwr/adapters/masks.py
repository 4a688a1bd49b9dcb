"""Masks: the entries of each target matrix that a sparse phase trains.

A mask is a pure function of (seed, round, matrix name, shape, density, structure). It
is drawn from the raw stream of NumPy's Philox bit generator: NEP 19 keeps this stream
stable across NumPy versions, unlike the methods of `Generator`.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from slora_flwr.common.random import draw_distinct, key


def draw_lines(
    seed: int,
    name: str,
    shape: tuple[int, int],
    density: float,
    structure: str,
    server_round: int = 0,
) -> NDArray[np.int64]:
    """Draw the entries, rows or columns that a mask consists of.

    Parameters
    ----------
    seed : int
        The run's seed.
    name : str
        The matrix's name in the backbone.
    shape : tuple of int
        (output features, input features).
    density : float
        Share of the entries, rows or columns. Their number is rounded, at least one.
    structure : str
        `unstructured`, `rows` (output features) or `columns` (input features).
    server_round : int
        The round of the mask, 0 for a mask fixed over the phase.

    Returns
    -------
    NDArray[np.int64]
        Row-major positions of entries, or indices of rows or columns; distinct and
        ascending.
    """
    size = _lines(shape, structure)
    stream = np.random.Philox(key=key(seed, server_round, name, *shape, structure))
    return draw_distinct(stream, max(1, round(density * size)), size)


def make_mask(
    seed: int,
    name: str,
    shape: tuple[int, int],
    density: float,
    structure: str = "unstructured",
    server_round: int = 0,
) -> NDArray[np.int64]:
    """Draw the trained entries of one target matrix; parameters as for `draw_lines`.

    Returns
    -------
    NDArray[np.int64]
        Row-major positions of the entries, distinct and ascending.
    """
    lines = draw_lines(seed, name, shape, density, structure, server_round)
    return positions(lines, shape, structure)


def positions(
    lines: NDArray[np.int64], shape: tuple[int, int], structure: str
) -> NDArray[np.int64]:
    """Return the row-major positions of all entries that lines cover, ascending."""
    rows, columns = np.arange(shape[0]), np.arange(shape[1])
    if structure == "rows":
        return (lines[:, None] * shape[1] + columns).ravel()
    if structure == "columns":
        return (rows[:, None] * shape[1] + lines).ravel()
    return lines


def allocate_densities(
    shapes: Mapping[str, tuple[int, int]], density: float, budget: str
) -> dict[str, float]:
    """Allocate the total number of masked entries to the matrices.

    Parameters
    ----------
    shapes : Mapping[str, tuple of int]
        (output features, input features) by matrix.
    density : float
        Share of all entries of all matrices.
    budget : str
        `uniform`: the same density for each matrix, as in the paper. `equal`: the same
        number of entries for each. `erdos-renyi`: a number proportional to m + n for
        an m x n matrix, so that smaller ones are denser (SET, arXiv 1707.04780).

    Returns
    -------
    dict[str, float]
        Each matrix's density, at most 1; the excess goes to the other matrices.
    """
    parts = {
        name: {"uniform": m * n, "equal": 1, "erdos-renyi": m + n}[budget]
        for name, (m, n) in shapes.items()
    }
    sizes = {name: m * n for name, (m, n) in shapes.items()}
    left = density * sum(sizes.values())
    densities: dict[str, float] = {}
    while parts:
        share = left / sum(parts.values())
        full = [name for name in parts if share * parts[name] >= sizes[name]]
        if not full:
            return densities | {n: share * parts[n] / sizes[n] for n in parts}
        for name in full:
            densities[name] = 1.0
            left -= sizes[name]
            del parts[name]
    return densities


def mask_size(shape: tuple[int, int], density: float, structure: str) -> int:
    """Return the number of entries of a mask."""
    lines = _lines(shape, structure)
    return max(1, round(density * lines)) * (shape[0] * shape[1] // lines)


def undrawn_lines(
    shape: tuple[int, int], density: float, structure: str
) -> NDArray[np.int64]:
    """Return as many lines as `draw_lines`, all of them 0 and held once."""
    return _zeros(max(1, round(density * _lines(shape, structure))))


def undrawn_positions(
    shape: tuple[int, int], density: float, structure: str, rounds: int = 1
) -> NDArray[np.int64]:
    """Return as many positions as masks cover together, all of them 0 and held once.

    Their number is exact for one round's mask, and expected for several rounds'.
    """
    entries = shape[0] * shape[1]
    missed = 1 - mask_size(shape, density, structure) / entries
    return _zeros(round(entries * (1 - missed**rounds)))


def _zeros(count: int) -> NDArray[np.int64]:
    return as_strided(np.zeros(1, dtype=np.int64), (count,), (0,))


def _lines(shape: tuple[int, int], structure: str) -> int:
    lines = {"unstructured": shape[0] * shape[1], "rows": shape[0], "columns": shape[1]}
    if structure not in lines:
        raise ValueError(
            f"mask structure is {structure!r}; allowed: {', '.join(lines)}"
        )
    return lines[structure]


def fingerprint(masks: dict[str, NDArray[np.int64]]) -> str:
    """Return a digest of named masks, by which two machines compare theirs.

    Returns
    -------
    str
        BLAKE2b of the names and the positions (little-endian int64), 32 hex digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, positions in masks.items():
        digest.update(f"{name}\x1f{len(positions)}\x1f".encode())
        digest.update(positions.astype("<i8").tobytes())
    return digest.hexdigest()
