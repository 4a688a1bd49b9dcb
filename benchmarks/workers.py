"""Measure clients per minute against the number of workers on one GPU or CPU.

The workers are this project's, each with a resident backbone, but without Flower: the
benchmark shows how many of them the device can keep busy. On a CPU they divide the
cores among them.
"""

import argparse
import json
import os
import subprocess
import sys
import time

WARM_UP = 2


def work(options: argparse.Namespace) -> None:
    """Act as one worker: print `ready`, await a line, train clients, print `done`."""
    import torch

    from slora_flwr.config import Value, parse
    from slora_flwr.training.trainer import Trainer

    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.child))
    config: dict[str, Value] = {
        "method": options.method,
        "rounds": 2,
        "sparse.rounds": 1,
        "model.name": options.model,
        "data.max-length": options.length,
        "clients.count": 1_000,
        "clients.partitioner": "virtual",
        "clients.examples": options.examples,
        "train.precision": options.precision,
    }
    trainer = Trainer(parse(config))
    phase = trainer.schedule[0]
    state = trainer.model.attach(phase).state()
    for client in range(WARM_UP):
        trainer.train_client(client, state, phase, 1)
    print("ready", flush=True)
    sys.stdin.readline()
    for client in range(WARM_UP, WARM_UP + options.clients // options.child):
        trainer.train_client(client, state, phase, 1)
    print("done", flush=True)


def measure(count: int) -> float:
    """Return the seconds that a number of workers take to train their clients."""
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--child", str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(count)
    ]

    def wait_for(word: str) -> None:
        for worker in workers:
            assert worker.stdout is not None
            if worker.stdout.readline().strip() != word:
                raise SystemExit(f"a worker of {count} ended before {word!r}")

    wait_for("ready")
    begun = time.perf_counter()
    for worker in workers:
        print(file=worker.stdin, flush=True)
    wait_for("done")
    seconds = time.perf_counter() - begun
    for worker in workers:
        worker.communicate()
    return seconds


def main() -> None:
    """Measure each number of workers, and print ratios to the first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--method", default="slora", help="only its first phase runs")
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--examples", type=int, default=64, help="per client")
    parser.add_argument("--length", type=int, default=32, help="tokens per text")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        work(options)
        return
    figures = {}
    for count in options.workers:
        trained = options.clients // count * count
        figures[count] = 60 * trained / measure(count)
    ratios = {
        count: rate / figures[options.workers[0]] for count, rate in figures.items()
    }
    if options.json:
        print(json.dumps({"figures": figures, "ratios": ratios}, indent=2))
        return
    for count, rate in figures.items():
        print(
            f"{count} workers: {rate:.0f} clients a minute, ratio {ratios[count]:.2f}"
        )


if __name__ == "__main__":
    main()
