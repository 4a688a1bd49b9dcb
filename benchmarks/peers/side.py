"""One side of the comparison, in a process of its own: python -m side NAME FOLDER.

The last line that it prints is JSON: the CPU and wall seconds of each round, from the
end of the one before, and each round's mean training loss. CPU seconds are those of the
process and of the children that have ended.
"""

import json
import sys
import time
from importlib import import_module
from importlib.metadata import distributions
from itertools import pairwise
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from typing import Any

from work import Work


def now() -> tuple[float, float]:
    """Return the CPU seconds that were used, and the wall's."""
    used = map(getrusage, (RUSAGE_SELF, RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used), time.perf_counter()


def run(name: str, work: Work) -> dict[str, Any]:
    """Train a side's rounds, and return their seconds and losses."""
    _ = work.batches  # read before the clock starts
    ends = [now()]
    losses = import_module(f"sides.{name}").train(work, lambda: ends.append(now()))
    if not len(ends) - 1 == len(losses) == work.rounds:
        raise RuntimeError(
            f"{name} ended {len(ends) - 1} rounds with {len(losses)} losses; the work "
            f"has {work.rounds}"
        )
    seconds = [
        (b[0] - a[0], b[1] - a[1]) for a, b in pairwise(ends)
    ]
    return {
        "cpu": [cpu for cpu, _ in seconds],
        "wall": [wall for _, wall in seconds],
        "losses": losses,
        "packages": {d.name.lower(): d.version for d in distributions()},
    }


def main() -> None:
    """Run the side that is named."""
    name, folder = sys.argv[1:]
    print("\n" + json.dumps(run(name, Work.read(Path(folder)))))


if __name__ == "__main__":
    main()
