"""Measure what a round of secure sums costs beside a plain one, without training.

    python benchmarks/secure_sums.py

Each client has a node of its own, and an update of given size. The nodes' side of a
round runs with the functions that nodes call, one node after another, the server's with
those that a round calls, and the messages' records are written and read; nothing is
sent, and Flower's own work on a message is left out. The plain sides are uploads of
`int8` and of `float32`. Every sum is checked against that of the same whole numbers
without masks.

Times are CPU seconds on one thread. The sides alternate client by client; a client's
figure is the median over clients, and its ratio the median of each client's own, with
quartiles. What the server does for a round is timed as a whole, and repeated.
"""

import argparse
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES, ChaCha20
from cryptography.hazmat.primitives.ciphers.modes import CTR
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from slora_flwr.aggregation.mean import Mean
from slora_flwr.aggregation.ring_sum import NAMES, RingSum
from slora_flwr.client.membership import (
    join_round,
    mask_sum,
    masked_report,
    new_keys,
    receive_letters,
    tell_shares,
)
from slora_flwr.config import RunConfig, Value, flatten, parse
from slora_flwr.engines.inline import run_inline
from slora_flwr.secure.graph import degree, link
from slora_flwr.secure.keys import PublicKeys
from slora_flwr.secure.masks import add_mask
from slora_flwr.secure.shares import join, split
from slora_flwr.secure.tally import Tally
from slora_flwr.secure.terms import Terms
from slora_flwr.training.trainer import Trainer
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.grid import Grid
from slora_flwr.wire.messages import Instruction, Report, message_bytes
from slora_flwr.wire.packing import pack
from slora_flwr.wire.secure_messages import (
    INTRODUCE,
    TELL,
    Introduction,
    Letters,
    MaskedReport,
    Question,
    read_shares,
    write_shares,
)
from slora_flwr.wire.state_channel import Upload, write_update

BOUND = 4.0
# Beyond so many values of all clients together, hours would be needed.
MOST_VALUES = 2 * 10**9
PLAIN = ("int8", "float32")
CLIENT_STEPS = ("introduce", "code", "mask", "tell")
SERVER_STEPS = ("introduce", "collect", "open")


class Stopwatch:
    """CPU seconds of this process, by what they went to."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Count what runs inside towards a name."""
        begun = time.process_time()
        yield
        spent = time.process_time() - begun
        self.seconds[name] = self.seconds.get(name, 0.0) + spent


@dataclass
class Bytes:
    """The bytes of a round's messages, by kind and way."""

    of: dict[str, list[int]] = field(default_factory=dict)

    def count(self, name: str, content: RecordDict, kind: str = "train") -> None:
        """Count a message with some content."""
        message = Message(content, dst_node_id=2**63, message_type=kind, group_id="1")
        self.of.setdefault(name, []).append(message_bytes(message))


def make_config(clients: int, seed: int) -> RunConfig:
    """Return the config of a run with secure sums."""
    values: dict[str, Value] = {
        "method": "lora",
        "clients.count": clients,
        "clients.per-round": clients,
        "clients.max-weight": 1,
        "clients.min-nodes": 2,
        "clients.min-replies": 2,
        "secure.aggregation": True,
        "secure.clip": BOUND,
        "upload.dtype": "int8",
        "seed": seed,
    }
    return parse(values)


def make_update(base: torch.Tensor, client: int) -> dict[str, torch.Tensor]:
    """Return a client's update, shorter than the bound."""
    return {"x": base.roll(client) * (1 - 0.5 / (client + 2))}


class PlainRound:
    """The plain side of a round: updates are coded, read again and averaged."""

    def __init__(self, dtype: str, shapes: dict[str, torch.Size]) -> None:
        self.codec = Codec(dtype)
        self.shapes = shapes
        self.fold = Mean(codec=self.codec)
        self.client: list[float] = []
        self.server = Stopwatch()
        self.bytes = Bytes()

    def train(self, client: int, update: dict[str, torch.Tensor]) -> None:
        """Code a client's update, as its node does, and fold it, as the server does."""
        watch = Stopwatch()
        with watch.time("code"):
            upload = code(update, self.codec, client)
            Mean(codec=self.codec).add_upload(upload, 1, client)
            report = Report(1, 0, "", update=upload.array)
            report.add(client, 1, 0.5, 1.0, len(upload.array.data))
            content = report.content()
        self.client.append(watch.seconds["code"])
        self.bytes.count("train up", content)
        with self.server.time("collect"):
            told = Report.read(content)
            self.fold.take(told.update, self.shapes, told.clients, told.examples)

    def close(self) -> None:
        """Take the mean."""
        with self.server.time("open"):
            self.fold.result()


def code(update: dict[str, torch.Tensor], codec: Codec | Grid, client: int) -> Upload:
    """Return a coded update, with what coding loses."""
    return write_update(
        update,
        codec,
        residual={},
        start={},
        importance="magnitude",
        stream=np.random.Philox(key=client),
        clip_norm=BOUND,
    )


class SecureRound:
    """The masked side of a round."""

    def __init__(self, clients: int, shapes: dict[str, torch.Size], seed: int) -> None:
        self.config = make_config(clients, seed)
        self.shapes = shapes
        # The state that all start from.
        self.state = {name: torch.zeros(shape) for name, shape in shapes.items()}
        self.server = Stopwatch()
        self.bytes = Bytes()
        self.steps: list[Stopwatch] = [Stopwatch() for _ in range(clients)]
        run_config = cast(dict[str, Any], flatten(self.config))
        self.contexts = [
            Context(7, client + 1, {}, RecordDict(), run_config)
            for client in range(clients)
        ]
        self.fold = RingSum(self.config, "lora", shapes)
        # The same sum without masks.
        self.plain = RingSum(self.config, "lora", shapes)

    def introduce(self) -> None:
        """Have all share their secrets with their neighbours."""
        told: list[bytes] = []
        for context, steps in zip(self.contexts, self.steps, strict=True):
            with steps.time("introduce"):
                told.append(new_keys(context))
        clients, secure = len(self.contexts), self.config.secure
        with self.server.time("introduce"):
            members = [*map(PublicKeys.unpack, told)]
            each = degree(clients, secure.threshold, secure.colluding)
            near = link(clients, each, np.random.default_rng(0))
            terms = Terms(7, 1, 1, secure.threshold)
            size = self.fold.grid.size
            self.tally = Tally(terms, members, near, self.fold.ring, size, len(NAMES))
        self.each = each
        for i, (context, steps) in enumerate(
            zip(self.contexts, self.steps, strict=True)
        ):
            with self.server.time("introduce"):
                others = {other: members[other].pack() for other in near[i]}
                own = members[i].pack()
                asked = Introduction(7, 1, 1, i, own, others).content()
            self.bytes.count("introduce down", asked, INTRODUCE)
            with steps.time("introduce"):
                answer = join_round(context, Introduction.read(asked)).content()
            self.bytes.count("introduce up", answer, INTRODUCE)
            with self.server.time("introduce"):
                letters = Letters.read(answer)
                self.tally.took_letters(i, letters.letters, letters.commitment)
        with self.server.time("introduce"):
            self.tally.settle()

    def train(self, client: int, update: dict[str, torch.Tensor]) -> None:
        """Code and mask a client's update, and add it up."""
        context, steps = self.contexts[client], self.steps[client]
        with self.server.time("introduce"):
            letters = self.tally.letters_to(client)
            state = pack({"x": torch.zeros(1)})
            asked = Instruction(1, 0, [client], "", state, letters=letters)
            content = asked.content()
        bare = Instruction(1, 0, [client], "", state).content()
        self.bytes.count("letters down", content)
        self.bytes.count("no letters down", bare)
        with steps.time("mask"):
            member = receive_letters(context, Instruction.read(content))
        with steps.time("code"):
            fold = RingSum(self.config, "lora", self.shapes)
            upload = code(update, fold.grid, client)
            fold.add_upload(upload, 1, client, 0.5)
        self.plain.add_upload(upload, 1, client, 0.5)
        with steps.time("mask"):
            about = digest(self.config, self.state)
            masked = mask_sum(context, member, fold, about)
            report = Report(1, 0, "", clients=[client])
            answer = masked_report(report, masked).content()
        self.bytes.count("train up", answer)
        with self.server.time("collect"):
            self.tally.add(client, MaskedReport.read(answer).masked)

    def close(self) -> None:
        """Open the sum, check it, and take the mean."""
        with self.server.time("open"):
            self.tally.about = digest(self.config, self.state)
            self.tally.check()
        for i, (context, steps) in enumerate(
            zip(self.contexts, self.steps, strict=True)
        ):
            with self.server.time("open"):
                asked = Question(1, 1, *self.tally.asks(i)).content()
            self.bytes.count("tell down", asked, TELL)
            with steps.time("tell"):
                shares = tell_shares(context, Question.read(asked))
                answer = write_shares(shares)
            self.bytes.count("tell up", answer, TELL)
            with self.server.time("open"):
                self.tally.took_shares(i, read_shares(answer))
        with self.server.time("open"):
            values, figures = self.tally.open()
            self.fold.open(values, figures, len(self.contexts))
            self.fold.result()
        expected = self.plain.ring.centred(self.plain.values)
        if not np.array_equal(values, expected):
            raise SystemExit("the masked sum is not the plain one")
        np.testing.assert_array_equal(figures, self.plain.figures)


def digest(config: RunConfig, state: dict[str, torch.Tensor]) -> bytes:
    """Return what binds masks to a task, as nodes and the server compute it."""
    trainer = cast(Trainer, SimpleNamespace(config=config))
    return Trainer.digest_task(trainer, 0, "", "", state)


def measure_round(clients: int, values: int, repeats: int) -> dict[str, Any]:
    """Return the figures of rounds of some clients with updates of some values."""
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(values, generator=draw)
    base *= 0.9 * BOUND / base.norm()
    shapes = {"x": base.shape}
    own: list[dict[str, float]] = []
    plain_own: dict[str, list[float]] = {dtype: [] for dtype in PLAIN}
    servers: list[dict[str, float]] = []
    plain_servers: dict[str, list[float]] = {dtype: [] for dtype in PLAIN}
    for repeat in range(repeats):
        secure = SecureRound(clients, shapes, repeat)
        plain = [PlainRound(dtype, shapes) for dtype in PLAIN]
        secure.introduce()
        for client in range(clients):
            update = make_update(base, client)
            order: list[SecureRound | PlainRound] = [secure, *plain]
            for side in order if client % 2 else order[::-1]:
                side.train(client, update)
        for side in order:
            side.close()
        own += [steps.seconds for steps in secure.steps]
        servers.append(secure.server.seconds)
        for dtype, other in zip(PLAIN, plain, strict=True):
            plain_own[dtype] += other.client
            plain_servers[dtype].append(sum(other.server.seconds.values()))
    totals = [sum(steps.values()) for steps in own]
    server_totals = [sum(steps.values()) for steps in servers]
    sizes = {name: mean(found) for name, found in secure.bytes.of.items()}
    masked = sizes["train up"]
    return {
        "clients": clients,
        "values": values,
        "repeats": repeats,
        "neighbours": secure.each,
        "ring_bits": secure.fold.ring.bits,
        "client_ms": {
            "secure": 1e3 * median(totals),
            **{dtype: 1e3 * median(found) for dtype, found in plain_own.items()},
        },
        "client_step_ms": {
            step: 1e3 * median(steps[step] for steps in own) for step in CLIENT_STEPS
        },
        "client_ratio": {
            dtype: spread(totals, found) for dtype, found in plain_own.items()
        },
        "server_s": {
            "secure": median(server_totals),
            **{dtype: median(found) for dtype, found in plain_servers.items()},
        },
        "server_step_s": {
            step: median(steps[step] for steps in servers) for step in SERVER_STEPS
        },
        "server_ratio": {
            dtype: spread(server_totals, found)
            for dtype, found in plain_servers.items()
        },
        "message_bytes": {
            **{name: size for name, size in sizes.items() if "letters" not in name},
            "train down, letters": sizes["letters down"] - sizes["no letters down"],
            **{
                f"train up, {p.codec.dtype}": mean(p.bytes.of["train up"])
                for p in plain
            },
        },
        "bytes_a_value": {
            "secure": masked / values,
            **{p.codec.dtype: mean(p.bytes.of["train up"]) / values for p in plain},
        },
        "peak_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def mean(found: list[int]) -> float:
    """Return the mean."""
    return sum(found) / len(found)


def spread(one: list[float], other: list[float]) -> list[float]:
    """Return the lower quartile, the median and the upper quartile of ratios."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    if len(ratios) < 4:
        return [min(ratios), median(ratios), max(ratios)]
    low, middle, high = quantiles(ratios, n=4)
    return [low, middle, high]


def alternate(
    sides: dict[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    """Return the CPU seconds of each call of each side, called in turns."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for call in sides.values():
        call()
    for repeat in range(repeats):
        order = [*sides.items()]
        for name, call in order if repeat % 2 else order[::-1]:
            begun = time.process_time()
            call()
            found[name].append(time.process_time() - begun)
    return found


def measure_stream(values: int = 10**7, repeats: int = 31) -> dict[str, Any]:
    """Return the speed of masks, and that of the key streams by themselves."""
    key = os.urandom(32)
    block = 2**18
    zeros, raw = bytes(block), bytearray(block + 16)
    sums = {
        bits: np.zeros(values * 4 // size, f"<u{size}")
        for bits, size in ((16, 2), (32, 4))
    }
    total = 4 * values

    def stream(cipher: Cipher[Any]) -> None:
        made = cipher.encryptor()
        for _ in range(total // block):
            made.update_into(zeros, raw)

    sides: dict[str, Callable[[], object]] = {
        "mask of 16 bits": lambda: add_mask((sums[16],), key, 1),
        "mask of 32 bits": lambda: add_mask((sums[32],), key, 1),
        "ChaCha20": lambda: stream(Cipher(ChaCha20(key, bytes(16)), None)),
        "AES-256-CTR": lambda: stream(Cipher(AES(key), CTR(bytes(16)))),
    }
    found = alternate(sides, repeats)
    return {
        "GB/s": {name: total / median(times) / 1e9 for name, times in found.items()},
        "speed over ChaCha20's": {
            name: spread(found["ChaCha20"], times) for name, times in found.items()
        },
    }


def measure_shares(repeats: int = 7) -> dict[str, Any]:
    """Return the times to share a secret, and to recover it; and PyCryptodome's."""
    figures: dict[str, Any] = {}
    for clients in (10, 100, 1_000):
        secure = make_config(clients, 0).secure
        holders = 1 + degree(clients, secure.threshold, secure.colluding)
        needed = Terms(1, 1, 1, secure.threshold).needed(holders)
        found = alternate(share_sides(needed, holders), repeats)
        figures[f"{needed} of {holders}"] = {
            "ms": {name: 1e3 * median(times) for name, times in found.items()},
            "speed-up": {
                name: spread(found[f"PyCryptodome's {name}"], found[name])
                for name in ("share", "recover")
            },
        }
    return figures


def share_sides(needed: int, holders: int) -> dict[str, Callable[[], object]]:
    """Return how a secret is shared and recovered, here and in PyCryptodome."""
    secret = os.urandom(32)
    halves = (secret[:16], secret[16:])
    theirs = [Shamir.split(needed, holders, half, ssss=False) for half in halves]
    told = dict(enumerate(split(secret, needed, holders)[:needed]))
    return {
        "share": lambda: split(secret, needed, holders),
        "recover": lambda: join(told, needed),
        "PyCryptodome's share": lambda: [
            Shamir.split(needed, holders, half, ssss=False) for half in halves
        ],
        "PyCryptodome's recover": lambda: [
            Shamir.combine(shares[:needed], ssss=False) for shares in theirs
        ],
    }


def hold_run(is_secure: bool, rounds: int) -> None:
    """Hold a run of ten clients on ten nodes on the inline engine."""
    config: dict[str, Value] = {
        "method": "slora",
        "rounds": rounds,
        "sparse.rounds": rounds // 2,
        "data.max-length": 32,
        "data.max-test": 50,
        "clients.count": 10,
        "clients.per-round": 10,
        "clients.partitioner": "virtual",
        "clients.examples": 32,
        "upload.dtype": "int8",
        "run.eval-every": 0,
    }
    if is_secure:
        config |= {
            "secure.aggregation": True,
            "secure.clip": BOUND,
            "clients.max-weight": 32,
            "clients.min-nodes": 2,
            "clients.min-replies": 2,
        }
    with tempfile.TemporaryDirectory() as folder:
        run_inline(config | {"run.dir": str(Path(folder) / "run")}, 10)


def measure_runs(repeats: int, rounds: int = 10) -> dict[str, Any]:
    """Return the wall and CPU seconds of whole runs, each in a process of its own."""
    found: dict[str, list[tuple[float, float]]] = {"plain": [], "secure": []}
    for repeat in range(repeats):
        for name in sorted(found, reverse=bool(repeat % 2)):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            begun = time.monotonic()
            command = [sys.executable, __file__, "--run", name, "--rounds", str(rounds)]
            subprocess.run(command, check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = sum(
                getattr(after, k) - getattr(before, k) for k in ("ru_utime", "ru_stime")
            )
            found[name].append((time.monotonic() - begun, cpu))
    sides = {name: [*zip(*pairs, strict=True)] for name, pairs in found.items()}
    figures: dict[str, Any] = {"rounds": rounds, "repeats": repeats}
    for i, what in enumerate(("wall_s", "cpu_s")):
        figures[what] = {name: median(of[i]) for name, of in sides.items()}
        ratios = spread([*sides["secure"][i]], [*sides["plain"][i]])
        figures[f"{what} ratio"] = ratios
    return figures


def _count(values: int) -> str:
    return f"10^{len(str(values)) - 1}"


def _ratio(found: list[float]) -> str:
    low, middle, high = found
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def print_tables(results: dict[str, Any]) -> None:
    """Print tables as in RESULTS.md."""
    print(
        "| clients, values | neighbours | client, ms: secure; `int8`; `float32` | "
        "ratio to `int8`; to `float32` | server, s | ratio | bytes a value |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in results["rounds"]:
        name = f"{row['clients']:,}, {_count(row['values'])}"
        if "neighbours" not in row:
            print(f"| {name} | not run | | | | | |")
            continue
        sides = ("secure", *PLAIN)
        own = "; ".join(f"{row['client_ms'][side]:.1f}" for side in sides)
        server = "; ".join(f"{row['server_s'][side]:.2g}" for side in sides)
        value = "; ".join(f"{row['bytes_a_value'][side]:.2f}" for side in sides)
        ratio = "; ".join(_ratio(row["client_ratio"][side]) for side in PLAIN)
        at_server = "; ".join(_ratio(row["server_ratio"][side]) for side in PLAIN)
        print(
            f"| {name} | {row['neighbours']} | {own} | {ratio} | {server} | "
            f"{at_server} | {value} |"
        )
    print(
        "\n| clients, values | node, ms: introduce; code; mask; tell | server, s: "
        "introduce; collect; open |"
    )
    print("|---|---|---|")
    for row in results["rounds"]:
        if "neighbours" in row:
            own = "; ".join(f"{ms:.2f}" for ms in row["client_step_ms"].values())
            server = "; ".join(f"{s:.3g}" for s in row["server_step_s"].values())
            name = f"{row['clients']:,}, {_count(row['values'])}"
            print(f"| {name} | {own} | {server} |")
    print("\n| clients | " + " | ".join(results["rounds"][0]["message_bytes"]) + " |")
    for row in results["rounds"]:
        if "neighbours" in row:
            sizes = " | ".join(f"{s:,.0f}" for s in row["message_bytes"].values())
            print(f"| {row['clients']:,}, {_count(row['values'])} | {sizes} |")
    for name in results.keys() & {"stream", "shares", "runs"}:
        print(f"\n{name}: {json.dumps(results[name], indent=1)}")


def main() -> None:
    """Measure rounds, key streams, shares and whole runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="*", default=[10, 100, 1_000])
    parser.add_argument(
        "--values", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7]
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10, help="of a whole run")
    parser.add_argument(
        "--rounds-only", action="store_true", help="no key streams, shares and runs"
    )
    parser.add_argument("--json", action="store_true", help="print only JSON")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    # Flower's launcher sets these in a ServerApp's process; messages carry them.
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 2**63, 0, 0
    if given.run:
        hold_run(given.run == "secure", given.rounds)
        return
    rounds = []
    for clients in given.clients:
        for values in given.values:
            if clients * values > MOST_VALUES:
                rounds.append({"clients": clients, "values": values})
                continue
            once = clients * values > 10**7 or clients >= 1_000
            repeats = 1 if once else given.repeats
            rounds.append(measure_round(clients, values, repeats))
            gc.collect()
            print(f"{clients} clients, {values} values", file=sys.stderr, flush=True)
    results: dict[str, Any] = {
        **{name: version(name) for name in ("flwr", "torch", "cryptography")},
        "python": platform.python_version(),
        "rounds": rounds,
    }
    if not given.rounds_only:
        results["stream"] = measure_stream()
        results["shares"] = measure_shares()
        results["runs"] = measure_runs(given.repeats, given.rounds)
    if given.json:
        print(json.dumps(results, indent=2))
        return
    print_tables(results)


if __name__ == "__main__":
    main()
