"""Measure the server's memory against the number of replies in a round.

One round of full fine-tuning with one node per client, so that each reply has the size
of the model. Nodes of the inline engine answer only when their reply is pulled, so no
replies queue up as in a SuperLink: the benchmark measures what the ServerApp keeps of
the replies it has processed. Memory is the process's peak, including the nodes' shared
backbone, minus the peak with one reply.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from slora_flwr.config import Value
from slora_flwr.engines.inline import run_inline


def peak(replies: int) -> int:
    """Run one round and return the process's peak memory in bytes."""
    with tempfile.TemporaryDirectory() as name:
        config: dict[str, Value] = {
            "method": "fft",
            "rounds": 1,
            "data.max-length": 16,
            "data.max-test": 50,
            "clients.count": replies,
            "clients.per-round": replies,
            "clients.partitioner": "virtual",
            "clients.examples": 4,
            "run.dir": str(Path(name) / "run"),
        }
        run_inline(config, replies)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Measure each count in a separate process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replies", type=int, nargs="+", default=[10, 100, 1_000])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(peak(options.child)))
        return
    peaks = {}
    for replies in (1, *options.replies):
        command = [sys.executable, __file__, "--child", str(replies)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[replies] = int(done.stdout.splitlines()[-1])
    figures = {n: peaks[n] - peaks[1] for n in options.replies}
    ratios = {n: peaks[n] / peaks[options.replies[0]] for n in options.replies}
    if options.json:
        print(json.dumps({"figures": figures, "ratios": ratios}, indent=2))
        return
    for replies, size in figures.items():
        print(
            f"{replies:>6} replies: {size / 1e6:+.1f} MB, ratio {ratios[replies]:.3f}"
        )


if __name__ == "__main__":
    main()
