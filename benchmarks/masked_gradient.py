"""Compare the times of two ways to compute a masked weight gradient, by shape.

`dense` computes the whole product and gathers the masked entries. `sampled` computes
only the masked entries, each a product of two columns. A ratio below 1 means that
sampling is faster.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from slora_flwr.adapters.masks import draw_lines
from slora_flwr.adapters.sparse import (
    gathered_gradient,
    sampled_gradient,
    sparse_pattern,
)

SHAPES = [(384, 384), (1536, 384), (768, 768), (3072, 768), (768, 3072)]
DENSITIES = [0.001, 0.01, 0.05, 0.1, 0.2]
TOKENS = [128, 1024]


def main() -> None:
    """Time both ways alternately for each shape, density and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    ratios = {}
    for shape in SHAPES:
        for tokens in TOKENS:
            for density in DENSITIES:
                name = f"{shape[0]}x{shape[1]}, {tokens} tokens, {density:g}"
                ratios[name] = _ratio(shape, tokens, density, options)
                if not options.json:
                    print(f"{name:<30} {ratios[name]:.2f}", flush=True)
    if options.json:
        print(json.dumps({"ratios": ratios}, indent=2))


def _ratio(
    shape: tuple[int, int], tokens: int, density: float, options: argparse.Namespace
) -> float:
    device = torch.device(options.device)
    drawn = draw_lines(0, "matrix", shape, density, "unstructured")
    positions = torch.from_numpy(drawn).to(device)
    pattern = sparse_pattern(positions, shape)
    x = torch.randn(tokens, shape[1], device=device)
    grad_y = torch.randn(tokens, shape[0], device=device)

    def seconds(way: Callable[[], torch.Tensor]) -> float:
        begun = time.perf_counter()
        way()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    turns = [
        seconds(lambda: sampled_gradient(x, grad_y, pattern))
        / seconds(lambda: gathered_gradient(x, grad_y, positions))
        for _ in range(options.turns)
    ]
    return statistics.median(turns)


if __name__ == "__main__":
    main()
