"""Measure the speed and size of encoded updates on one core.

Speed is in gigabytes of float32 input per second, the best of several repetitions.
Values are Gaussian with a different scale in each 384 x 384 matrix, as in updates.
Sizes are relative to float32. Overheads are relative to a bound: log2(n over k) for the
positions of k out of n randomly chosen values, and the entropy of the codes'
frequencies for the final lossless step.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slora_flwr.wire.codec import Codec
from slora_flwr.wire.frame import wrap
from slora_flwr.wire.positions import decode_positions, encode_positions, entropy_bound
from slora_flwr.wire.quantize import quantize
from slora_flwr.wire.selection import choose

REPEATS = 5
SIDE = 384
CODECS = {
    **{dtype: Codec(dtype) for dtype in ("float16", "bfloat16", "int8", "int4")},
    "float32, lossless": Codec(lossless=True),
    "int8, lossless": Codec("int8", lossless=True),
    "top 10% of float32": Codec(share=0.1),
    "top 10% of int8": Codec("int8", share=0.1),
}


def make_state(values: int) -> dict[str, Tensor]:
    """Return matrices whose values have different scales."""
    draw = torch.Generator().manual_seed(0)
    return {
        f"{i}": 1e-3
        * math.exp(float(torch.randn((), generator=draw)))
        * torch.randn(SIDE, SIDE, generator=draw)
        for i in range(max(1, values // SIDE**2))
    }


def best(call: Callable[[], Any]) -> float:
    """Return the seconds of the fastest of several calls."""
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def measure(codec: Codec, state: dict[str, Tensor]) -> dict[str, float]:
    """Measure a codec: encoding with stochastic rounding, and decoding."""
    count = sum(tensor.numel() for tensor in state.values())
    weights = {name: tensor.abs() for name, tensor in state.items()}
    shapes = {name: tensor.shape for name, tensor in state.items()}

    def encode() -> Any:
        chosen = choose(weights, codec.parts(count), 0) if codec.share else None
        return codec.encode(state, chosen, np.random.Philox(key=1))

    array = encode()
    size = 4 * count
    return {
        "size": len(array.data) / size,
        "encode": size / best(encode) / 1e9,
        "decode": size / best(lambda: codec.decode(array, shapes)) / 1e9,
    }


def measure_positions(share: float, size: int) -> dict[str, float]:
    """Measure the encoding of positions."""
    count = round(share * size)
    chosen = np.random.default_rng(0).choice(size, count, replace=False)
    chosen.sort()
    data = encode_positions(chosen, size)
    return {
        "bits": 8 * len(data) / count,
        "over": len(data) / entropy_bound(count, size) - 1,
        "encode": 4 * size / best(lambda: encode_positions(chosen, size)) / 1e9,
        "decode": 4 * size / best(lambda: decode_positions(data, count, size)) / 1e9,
    }


def lossless_over(dtype: str, state: dict[str, Tensor]) -> float:
    """Return the overhead of the lossless step over the entropy of the codes' bytes."""
    values = torch.cat([tensor.reshape(-1) for tensor in state.values()]).numpy()
    codes, _ = quantize(values, dtype, np.random.Philox(key=1))
    shares = np.bincount(np.frombuffer(codes, np.uint8)) / len(codes)
    shares = shares[shares > 0]
    entropy = -(shares * np.log2(shares)).sum() / 8 * len(codes)
    return float(len(wrap(codes, 1, compress=True)) / entropy - 1)


def main() -> None:
    """Measure codecs, positions and the lossless step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", type=int, default=4_000_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    state = make_state(options.values)
    codecs = {name: measure(codec, state) for name, codec in CODECS.items()}
    positions = {
        share: measure_positions(share, options.values)
        for share in (0.5, 0.1, 0.01, 0.001)
    }
    over = {dtype: lossless_over(dtype, state) for dtype in ("int8", "int4")}
    if options.json:
        found = {"codecs": codecs, "positions": positions, "lossless": over}
        print(json.dumps(found, indent=2))
        return
    for name, row in codecs.items():
        print(
            f"{name:20} {row['size']:.3f} of float32, GB/s of float32: encode "
            f"{row['encode']:.2f}, decode {row['decode']:.2f}"
        )
    for share, row in positions.items():
        print(
            f"positions of {share:.1%}: {row['bits']:.2f} bits, {row['over']:+.1%} "
            f"over the bound, encode {row['encode']:.2f}, decode {row['decode']:.2f}"
        )
    for dtype, extra in over.items():
        print(f"lossless step on {dtype}: {extra:+.1%} over the codes' entropy")


if __name__ == "__main__":
    main()
