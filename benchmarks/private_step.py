"""Compare the time of a step with privacy of each example to that of a plain one.

The ways take turns on the same batch, so that other load on the machine affects all
alike; a ratio is the median over turns of the ratio within a turn. `private` is one
backward pass with hooks, clipping and noise; `one by one` is the same with a backward
pass for each example.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from slora_flwr.config import RunConfig, parse
from slora_flwr.config.schedule import make_schedule
from slora_flwr.data.examples import Batch
from slora_flwr.training.attached_model import AttachedModel
from slora_flwr.training.example_gradients import ExampleGradients
from slora_flwr.training.loop import LocalOptimizer
from slora_flwr.training.private import GridSum
from slora_flwr.training.process_data import ProcessData

METHODS = {"lora": "lora", "sparse": "sft", "all weights": "fft"}
RATIOS = [("private", "plain"), ("one by one", "plain"), ("private", "one by one")]


def main() -> None:
    """Time the ways for each method, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="minilm-l6-h384-uncased")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--methods", nargs="+", default=["lora", "sparse"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    ratios = {}
    for name in options.methods:
        config = parse({"model.name": options.model, "method": METHODS[name]})
        found = _seconds(config, options.batch, options.tokens, options.turns)
        for one, other in RATIOS:
            pairs = zip(found[one], found[other], strict=True)
            ratio = statistics.median(mine / theirs for mine, theirs in pairs)
            ratios[f"{name}: {one} / {other}"] = ratio
            if not options.json:
                print(f"{name + ': ' + one + ' / ' + other:<36} {ratio:.2f}")
    if options.json:
        print(json.dumps({"ratios": ratios}, indent=2))


def _seconds(
    config: RunConfig, rows: int, tokens: int, turns: int
) -> dict[str, list[float]]:
    """Return the seconds of each way's steps, turn by turn."""
    model = AttachedModel(config, ProcessData(config))
    phase = make_schedule(config)[0]
    adapter = model.attach(phase)
    adapter.begin(1)
    backbone = model.backbone
    backbone.model.train()
    generator, units = np.random.default_rng(), np.ones(rows, dtype=np.int64)
    ids = torch.randint(5, backbone.tokenizer.vocab_size, (rows, tokens))
    labels = torch.randint(backbone.model.config.num_labels, (rows,))
    batch = Batch(ids, torch.ones_like(ids), labels).to(backbone.device)
    optimizer = LocalOptimizer(adapter, phase.recipe)
    gradients = ExampleGradients(backbone, adapter, "float32")
    assert gradients.together

    def plain() -> None:
        (backbone.task.loss(backbone.model, batch) / rows).backward()
        optimizer.step()

    def private(*, together: bool) -> None:
        gradients.together = together
        total = GridSum(optimizer.parameters, 1.0)
        total.add(gradients.of(batch), units)
        total.perturb(1.0, generator)
        means = total.over(rows)
        for parameter, mean in zip(optimizer.parameters, means, strict=True):
            parameter.grad = mean
        optimizer.step()

    ways: dict[str, Callable[[], None]] = {
        "plain": plain,
        "private": lambda: private(together=True),
        "one by one": lambda: private(together=False),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, step in ways.items():
            begun = time.perf_counter()
            step()
            if backbone.device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first warms up
                found[name].append(time.perf_counter() - begun)
    return found


if __name__ == "__main__":
    main()
