"""Compare the handoff's truncated SVD of a sparse delta with a dense SVD.

For each shape, a delta of 1% density is factored by this project's code and by LAPACK's
full SVD, both on the same cores. The error is that of the energy kept by the rank. The
seconds for a whole model are computed from those for its shapes.
"""

import argparse
import json
import time
from typing import Any

import numpy as np

from slora_flwr.adapters.masks import make_mask
from slora_flwr.common.svd import truncated_svd

DENSITY, RANK = 0.01, 8
SHAPES = [(768, 768), (768, 3072), (4096, 4096), (4096, 11008)]
# Llama-7B: 32 blocks of four square matrices and three of the feed-forward layer.
WHOLE = {(4096, 4096): 32 * 4, (4096, 11008): 32 * 3}


def compare(shape: tuple[int, int], structure: str) -> dict[str, float]:
    """Factor one delta by both methods."""
    positions = make_mask(0, "benchmark", shape, DENSITY, structure)
    values = np.random.default_rng(0).normal(size=len(positions))
    started = time.perf_counter()
    sparse = truncated_svd(positions, values, shape, RANK)
    sparse_seconds = time.perf_counter() - started
    dense = np.zeros(shape[0] * shape[1], dtype=np.float32)
    dense[positions] = values
    started = time.perf_counter()
    singular = np.linalg.svd(dense.reshape(shape), full_matrices=False)[1]
    dense_seconds = time.perf_counter() - started
    singular = singular.astype(np.float64)
    energy = float((singular[:RANK] ** 2).sum() / (singular**2).sum())
    return {
        "sparse seconds": sparse_seconds,
        "dense seconds": dense_seconds,
        "dense / sparse": dense_seconds / sparse_seconds,
        "energy kept": sparse.energy,
        "error of the energy": abs(sparse.energy - energy) / energy,
    }


def main() -> None:
    """Compare all shapes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="without the 4096 shapes")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    shapes = SHAPES[:2] if options.small else SHAPES
    found: dict[str, Any] = {
        f"{m} x {n} {structure}": compare((m, n), structure)
        for m, n in shapes
        for structure in ("unstructured", "rows")
    }
    if not options.small:
        found["a 7B model's layers, estimated"] = {
            way: sum(
                count * found[f"{m} x {n} unstructured"][way]
                for (m, n), count in WHOLE.items()
            )
            for way in ("sparse seconds", "dense seconds")
        }
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for name, figures in found.items():
        told = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
        print(f"{name}: {told}")


if __name__ == "__main__":
    main()
