"""One side of the comparison, as a process: python -m side NAME FOLDER [PRECISION].

It trains a round and waits for a line of standard input before the next. After each it
prints the CPU and wall seconds that it took, and after the last its losses, as JSON.
CPU seconds are those of the process and of the children that have ended.
"""

import json
import os
import sys
import time
from dataclasses import replace
from importlib import import_module
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from typing import TextIO

import torch


class Turns:
    """Tells of the end of each round, and waits for the next turn.

    Parameters
    ----------
    out : TextIO
        Where to print.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._begun = self._now()

    def end(self) -> None:
        """End a round."""
        passed = [b - a for a, b in zip(self._begun, self._now(), strict=True)]
        self.tell(dict(zip(("cpu", "wall"), passed, strict=True)))
        if not sys.stdin.readline():
            raise SystemExit("the comparison ended before its rounds did")
        self._begun = self._now()

    def tell(self, told: object) -> None:
        """Print a line of JSON."""
        print(json.dumps(told), file=self._out, flush=True)

    @staticmethod
    def _now() -> tuple[float, float]:
        used = map(getrusage, (RUSAGE_SELF, RUSAGE_CHILDREN))
        return sum(u.ru_utime + u.ru_stime for u in used), time.perf_counter()


def define_vision_operators() -> None:
    """Have torchvision import where it cannot load its operators.

    PyPI's build is for CUDA, and cannot beside PyTorch's build for CPUs. transformers
    imports it wherever it is installed, as what some peers require. Nobody uses it.
    """
    if find_spec("torchvision") is not None and torch.version.cuda is None:
        for name in ("nms", "qnms"):
            told = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", told)


def main() -> None:
    """Train the rounds of the side that is named."""
    name, folder, *precisions = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed
    define_vision_operators()
    from work import Work

    work = Work.read(Path(folder))
    for precision in precisions:
        config = {**work.config, "train.precision": precision}
        work = replace(work, precision=precision, config=config)
    _ = work.batches  # read before the clock starts
    side = import_module(f"sides.{name}")
    turns = Turns(out)
    losses = side.train(work, turns.end)
    packages = {d.name.lower(): d.version for d in distributions()}
    turns.tell({"losses": losses, "packages": packages})


if __name__ == "__main__":
    main()
