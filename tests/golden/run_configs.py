"""Tiny runs of many configs, and all that each of them computed, as one JSON file.

Every run is a `slora run --engine inline` with the embedded model, in a process and a
folder of its own. Of its run directory the facts hold

- each state and each export: its tensors' names, dtypes, shapes and BLAKE2b digests;
- the events and the summary without what a clock said, the ledger, the config;
- the layout of its messages.

Two checkouts compute the same if `--compare` finds no difference between their files:

    python -m tests.golden.run_configs --out facts.json
    python -m tests.golden.run_configs --compare facts.json other.json

Digests and metrics are those of one machine and one number of threads, since the last
bits of a sum depend on both. `--stable` leaves only what is the same everywhere, adds
the protocol and digests of payloads, and overwrites no facts of the same protocol from
which these differ.
"""

import argparse
import csv
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    # Whatever the processor has: `auto` is float32 here.
    "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
    "TOKENIZERS_PARALLELISM": "false",
}

Config = dict[str, Any]
Facts = dict[str, Any]

# Below the folder that a case has to itself.
IMPORTED = (
    "datasets",
    "flwr_datasets",
    "peft",
    "slora_flwr.cli",
    "slora_flwr.server.run",
    "transformers.models.bert.modeling_bert",
)
FOLDER = "./run"
MESSAGES = "messages"
# How far losses on other machines may be apart, relatively.
CLOSE = 1e-4
RAISE = "raise PROTOCOL in slora_flwr/common/protocol.py and write the facts anew"
TEXTS = "./texts.csv"
CLASSES = ("garden", "kitchen", "music", "weather")
TINY: Config = {
    "method": "slora",
    "rounds": 4,
    "data.name": TEXTS,
    "data.max-length": 16,
    "clients.count": 6,
    "clients.per-round": 3,
    "clients.partitioner": "iid",
    "train.batch-size": 8,
    "sparse.rounds": 2,
    "lora.rank": 4,
    "run.dir": FOLDER,
}
INT8: Config = {"upload.dtype": "int8", "download.dtype": "int8"}
LOSSLESS: Config = {"upload.lossless": True, "download.lossless": True}
CODED: Config = INT8 | LOSSLESS | {"upload.top-k": 0.25, "upload.feedback": True}
PER_ROUND: Config = {"sparse.schedule": "per-round"}
PRIVATE: Config = {
    "privacy.noise-multiplier": 1.0,
    "privacy.clip-norm": 0.05,
    "privacy.delta": 0.01,
}


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes
    ----------
    changes : Config
        What its config has beside `TINY`.
    nodes : int
        How many nodes it has.
    dies_in : tuple[int, ...]
        Rounds in which it is killed, before it has their checkpoint, and goes on.
    seed : int or None
        Of the generator that privacy draws from; None for the system's.
    is_portable : bool
        Whether its ledger and its layouts are the same on every machine.
    """

    changes: Config
    nodes: int = 1
    dies_in: tuple[int, ...] = ()
    seed: int | None = None
    is_portable: bool = True

    def config_in(self, place: Path) -> Config:
        """Return the whole run config, with paths in a folder."""
        return {
            key: str(place / value)
            if isinstance(value, str) and value.startswith("./")
            else value
            for key, value in (TINY | self.changes).items()
        }

    @property
    def has_fixed_sizes(self) -> bool:
        """Whether no payload's size depends on the values in it."""
        changes = self.changes
        lossless = {"upload.lossless", "download.lossless"} & changes.keys()
        return not (lossless or changes.get("upload.top-k"))


METHODS = (
    "slora",
    "sft",
    "lora",
    "ffa-lora",
    "alternate-lora",
    "fedex-lora",
    "flexlora",
    "head-lora",
    "fft",
    "bitfit",
    "houlsby",
    "pfeiffer",
    "head",
)
CASES: dict[str, Case] = {
    **{name: Case({"method": name, "rounds": 3}) for name in METHODS},
    # Codecs
    "int8": Case(INT8, nodes=2),
    "coded": Case(CODED, nodes=2),
    "coded-fft": Case({"method": "fft"} | CODED),
    "int4-bfloat16": Case(
        LOSSLESS | {"upload.dtype": "int4", "download.dtype": "bfloat16"}
    ),
    "float16-product": Case(
        {"method": "lora", "upload.dtype": "float16", "download.dtype": "float16"}
        | {"upload.top-k": 0.1, "upload.importance": "product"}
    ),
    "no-feedback": Case(CODED | {"upload.feedback": False}),
    # Masks
    "per-round": Case(PER_ROUND, nodes=2),
    "per-round-coded": Case(PER_ROUND | CODED, nodes=2),
    "per-round-rows": Case({"method": "sft", "sparse.mask": "rows"} | PER_ROUND),
    "columns": Case({"sparse.mask": "columns"}),
    "erdos-renyi": Case({"sparse.budget": "erdos-renyi"}),
    # How many rounds it takes depends on accuracies.
    "open": Case({"rounds": 8, "sparse.rounds": 0}, is_portable=False),
    # The low-rank phase
    "w0": Case({"lora.base": "w0"}),
    "warm-start": Case({"lora.base": "warm-start"}),
    "warm-start-coded": Case({"lora.base": "warm-start"} | CODED),
    "ffa": Case({"lora.aggregator": "ffa"}),
    "alternate": Case({"lora.aggregator": "alternate"}),
    "exact": Case({"lora.aggregator": "exact"}, nodes=2),
    "exact-coded": Case({"lora.aggregator": "exact"} | PER_ROUND | INT8 | LOSSLESS),
    "flexlora-coded": Case({"lora.aggregator": "flexlora"} | INT8),
    "ranks": Case({"method": "lora", "lora.ranks": "1,2,4"}, nodes=2),
    "ranks-flexlora": Case({"method": "flexlora", "lora.ranks": "1,2,4"}, nodes=2),
    "ranks-w0": Case({"lora.base": "w0", "lora.ranks": "2,4"}),
    "federa": Case({"method": "lora", "lora.start": "federa"}),
    "federa-ffa": Case({"method": "ffa-lora", "lora.start": "federa"}),
    "orthonormal": Case({"method": "lora", "lora.start": "orthonormal"}),
    "root-rank": Case({"lora.scaling": "root-rank", "lora.factors": "b"}),
    # The server
    "median": Case({"server.robust": "median", "clients.min-replies": 3}),
    "trimmed-mean": Case({"method": "fft", "server.robust": "trimmed-mean"}),
    "multi-krum": Case(
        {"method": "lora", "server.robust": "multi-krum", "clients.min-replies": 3},
        nodes=2,
    ),
    "krum": Case(
        {"server.robust": "krum", "server.byzantine": 1, "clients.per-round": 6}
        | {"clients.min-replies": 5, "attack.kind": "label-flip"}
    ),
    "fedadam": Case({"server.optimizer": "fedadam", "server.lr": 0.01}),
    "fedavgm": Case({"method": "lora", "server.optimizer": "fedavgm"} | CODED),
    "clip-norm": Case({"server.clip-norm": 0.05}, nodes=2),
    "private": Case(PRIVATE, nodes=2, seed=0, is_portable=False),
    "private-coded": Case(PRIVATE | CODED, seed=1, is_portable=False),
    # Clients
    "scaled-update": Case({"method": "lora", "attack.kind": "scaled-update"}),
    "label-flip": Case({"attack.kind": "label-flip", "attack.share": 0.5}),
    "holdout": Case({"clients.holdout": 0.25}, nodes=2),
    "dirichlet": Case({"clients.partitioner": "dirichlet", "clients.alpha": 0.5}),
    "virtual": Case({"clients.partitioner": "virtual", "clients.examples": 12}),
    "one-client-a-node": Case({"clients.count": 0} | CODED, nodes=4),
    "own-data": Case(
        {"data.name": "node", "data.train": "./node-{}.csv", "data.text": "text"}
        | {"data.label": "label", "clients.count": 0, "clients.min-nodes": 3}
        | {"clients.holdout": 0.25},
        nodes=3,
    ),
    "own-data-coded": Case(
        {"data.name": "node", "data.train": "./node-{}.csv", "data.text": "text"}
        | {"data.label": "label", "clients.count": 0, "clients.min-nodes": 3}
        | {"data.test": TEXTS}
        | CODED,
        nodes=3,
    ),
    # Which texts there are depends on the Python.
    "stdlib-docs": Case(
        {"method": "lora", "rounds": 2, "data.name": "stdlib-docs"}
        | {"data.max-test": 64, "clients.partitioner": "virtual"}
        | {"clients.examples": 12},
        is_portable=False,
    ),
    # Training
    "bfloat16": Case({"model.dtype": "bfloat16"}),
    "mixed-precision": Case({"method": "lora", "train.precision": "bf16"}),
    "sgd": Case(
        {"train.optimizer": "sgd", "train.momentum": 0.9, "train.weight-decay": 0.01}
        | {"train.prox": 0.1, "train.clip-norm": 1.0, "sparse.epochs": 2}
    ),
    "seldom-evaluated": Case({"run.eval-every": 3, "run.target": 0.1, "seed": 7}),
    # Interruptions
    "resumed": Case({}, dies_in=(2, 4)),
    "resumed-coded": Case(CODED, nodes=2, dies_in=(2, 3)),
    "resumed-per-round": Case(
        PER_ROUND | {"lora.aggregator": "exact"} | INT8, dies_in=(3,)
    ),
}


def run_cases(names: list[str]) -> dict[str, Facts]:
    """Return the facts of the runs of some cases."""
    facts = {}
    with tempfile.TemporaryDirectory(prefix="slora-golden-") as folder:
        os.environ["SLORA_HOME"] = f"{folder}/home"
        # Imports take longer than a run: those that are forked have them already.
        for module in IMPORTED:
            import_module(module)
        for name in names:
            print(name, file=sys.stderr, flush=True)
            place = Path(folder) / name
            _run_apart(CASES[name], place)
            facts[name] = read_facts(place)
    return facts


def _run_apart(case: Case, place: Path) -> None:
    """Make a run in a process of its own, or in several where it is killed."""
    context = multiprocessing.get_context("fork")
    for number, dies_in in enumerate((*case.dies_in, 0)):
        arguments = (case, place, dies_in, number > 0)
        process = context.Process(target=_run_here, args=arguments)
        process.start()
        process.join()
        if process.exitcode != (-signal.SIGKILL if dies_in else 0):
            log = (place / "log").read_text()[-3000:]
            raise RuntimeError(f"{place.name} ended with {process.exitcode}: {log}")


def _run_here(case: Case, place: Path, dies_in: int = 0, resumes: bool = False) -> None:
    """Make a run in a folder."""
    config = case.config_in(place)
    if resumes:
        config |= {"run.dir": "", "run.resume": config["run.dir"]}
    else:
        place.mkdir()
        write_texts(place / TEXTS, 120, seed=0)
        for node in range(case.nodes):
            write_texts(place / f"node-{node}.csv", 24 + 8 * node, seed=1 + node)
    if dies_in:
        _die_before(f"round-{dies_in:04d}.safetensors")
    from tests.golden.wire import note_messages

    note_messages(place / MESSAGES)
    with (place / "log").open("ab") as log:
        kept = os.dup(1), os.dup(2)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            _run(config, case.nodes, case.seed)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)


def _run(config: Config, nodes: int, seed: int | None) -> None:
    if seed is not None:  # no command takes it
        import numpy as np

        from slora_flwr.engines.inline import InlineGrid
        from slora_flwr.server.run import run

        run_id = time.time_ns()
        grid = InlineGrid(config, nodes, run_id)
        run(grid, config, run_id, np.random.default_rng(seed))
        return

    from slora_flwr.cli import app

    pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    command = ["run", "--engine", "inline", "--nodes", str(nodes), "-c", pairs]
    if status := app(command, standalone_mode=False):
        raise RuntimeError(f"`slora {' '.join(command)}` ended with {status}")


def _die_before(name: str) -> None:
    """Kill this process when it gives a file its name."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and os.fspath(arguments[1]).endswith(name):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def write_texts(path: Path, count: int, seed: int) -> None:
    """Write labelled texts, of whose words half tell the label."""
    words = {
        "garden": "rose hedge soil seed spade lawn bloom root",
        "kitchen": "oven spoon flour salt knife butter broth pan",
        "music": "violin chord tempo drum choir flute melody string",
        "weather": "rain cloud storm frost wind thunder sun fog",
    }
    draw = random.Random(seed)
    every = " ".join(words.values()).split()
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for number in range(count):
            label = CLASSES[number % len(CLASSES)]
            telling = draw.choices(words[label].split(), k=4)
            rows.writerow([" ".join(telling + draw.choices(every, k=4)), label])


def read_facts(place: Path) -> Facts:
    """Return all that a run's directory says, but for what a clock said."""
    directory = place / FOLDER
    texts = [(directory / n).read_text() for n in ("config.toml", "resolved.toml")]
    config = tomllib.loads("\n".join(texts).replace(str(place), "."))
    del config["versions"], config["engine"]
    states = sorted((directory / "checkpoints").glob("*.safetensors"))
    lines = (directory / "events.jsonl").read_text().splitlines()
    with (directory / "ledger.csv").open(newline="") as file:
        ledger = list(csv.DictReader(file))
    exports = [
        path
        for folder in ("adapter", "model")
        for path in sorted((directory / folder).rglob("*"))
        if path.is_file()
    ]
    return {
        "config": config,
        "summary": _timeless(json.loads((directory / "summary.json").read_text())),
        "events": [_timeless(json.loads(line)) for line in lines],
        "ledger": ledger,
        "messages": sorted({*(place / MESSAGES).read_text().splitlines()}),
        "states": {
            path.stem: read_tensors(path)
            for path in states
            if not path.stem.startswith("round-")
        },
        "exports": {
            path.relative_to(directory).as_posix(): _read_export(path)
            for path in exports
        },
    }


def read_tensors(path: Path) -> Facts:
    """Return a safetensors file's tensors: dtype, shape and digest; and its metadata.

    The digest is of the bytes as they lie in the file.
    """
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    found: Facts = {"metadata": header.pop("__metadata__", {})}
    for name in sorted(header):
        dtype, shape = header[name]["dtype"], header[name]["shape"]
        first, last = header[name]["data_offsets"]
        digest = blake2b(data[start + first : start + last], digest_size=16).hexdigest()
        found[name] = f"{dtype} {shape} {digest}"
    return found


def _read_export(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return read_tensors(path)
    # It names the model by its folder.
    spec = find_spec("slora_embedded")
    assert spec is not None
    assert spec.origin is not None
    text = path.read_text().replace(str(Path(spec.origin).parent), "embedded")
    if path.suffix != ".json":
        return blake2b(text.encode(), digest_size=16).hexdigest()
    read = json.loads(text)
    if path.name == "adapter_config.json":
        # PEFT keeps them as a set.
        read["target_modules"].sort()
    # What is long and the model's own, a tokenizer's table, would drown the rest.
    if len(text) > 10_000:
        return blake2b(json.dumps(read).encode(), digest_size=16).hexdigest()
    return read


def _timeless(value: Any) -> Any:
    """Leave out seconds, and the run's id, which is made of the time."""
    if isinstance(value, list):
        return [_timeless(item) for item in value]
    if not isinstance(value, dict):
        return value
    left_out = {"directory", "seconds", "took", "run"}
    return {k: _timeless(v) for k, v in value.items() if k not in left_out}


def keep_stable(facts: Mapping[str, Facts]) -> Facts:
    """Return what is the same on every machine.

    Returns
    -------
    dict
        `protocol`, that of the code; `messages`, the layout of all; `payloads`,
        digests of a fixed state's bytes. `layouts` of states and exports: dtype and
        shape of each tensor, and the digest where it holds whole numbers, which are
        masks' positions. `runs` by their names: the layout of each file, the cohort
        and the examples of each round, bytes that other methods would send in them,
        and the ledger: round, phase, direction, clients, planned payload bytes, and
        those sent where no value changes them. `losses` of each round of a run, in
        training and in the evaluation, which `list_differences` compares within
        `CLOSE`.
    """
    from slora_flwr.common.protocol import PROTOCOL
    from tests.golden.wire import digest_payloads, list_whole_messages

    messages = {*list_whole_messages()}
    layouts: Facts = {}
    runs: Facts = {}
    for name, found in facts.items():
        if not CASES[name].is_portable:
            continue
        files = {"last": found["states"]["last"]}
        if "base" in found["states"]:
            files["base"] = found["states"]["base"]
        files |= {
            name: tensors
            for name, tensors in found["exports"].items()
            if name.endswith(".safetensors")
        }
        runs[name] = {"files": {}}
        for file, tensors in files.items():
            layout = _layout(tensors)
            key = blake2b(json.dumps(layout).encode(), digest_size=4).hexdigest()
            layouts[key] = layout
            runs[name]["files"][file] = key
        runs[name]["same_rounds"] = found["summary"]["same_rounds"]
        columns = ["round", "phase", "direction", "clients", "planned_payload_bytes"]
        if CASES[name].has_fixed_sizes:
            columns.append("payload_bytes")
        runs[name]["ledger"] = [
            " ".join(row[column] or "-" for column in columns)
            for row in found["ledger"]
        ]
        runs[name]["rounds"] = [
            f"{event['round']} {event['phase']} cohort {event['cohort']} examples "
            f"{[client['examples'] for client in event['clients'].values()]}"
            for event in found["events"]
            if event["event"] == "round"
        ]
        runs[name]["losses"] = [
            [float(f"{event[key]:.6g}") for key in ("train_loss", "loss")]
            for event in found["events"]
            if event["event"] == "round" and "loss" in event
        ]
        messages.update(found["messages"])
    return {
        "protocol": PROTOCOL,
        "messages": sorted(messages),
        "payloads": digest_payloads(),
        "layouts": dict(sorted(layouts.items())),
        "runs": runs,
    }


def _layout(tensors: Facts) -> list[str]:
    layout = []
    for name, described in tensors.items():
        if name != "metadata":
            kind, digest = described.rsplit(" ", 1)
            of_integers = kind.startswith("I")
            layout.append(f"{name} {kind}" + (f" {digest}" if of_integers else ""))
    return layout


def list_differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Yield a line for each place where two JSON values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            below = f"{path}/{key}"
            if key in one and key in other:
                yield from list_differences(one[key], other[key], below)
            else:
                yield f"{below}: only in the {'first' if key in one else 'second'}"
    elif isinstance(one, float) and "/losses/" in path:
        if not math.isclose(one, other, rel_tol=CLOSE):
            yield f"{path}: {one} is not close to {other}"
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from list_differences(*pair, f"{path}/{index}")
    # As text, where NaN equals itself.
    elif json.dumps(one) != json.dumps(other):
        yield f"{path}: {json.dumps(one)} != {json.dumps(other)}"


def must_raise(kept: Facts, found: Facts) -> list[str]:
    """Return the differences for which the protocol should have been raised.

    Runs that only one of them has do not count: they are new, or no longer made. Nor do
    the files of exports, which no other version of slora-flwr reads.
    """
    if kept["protocol"] != found["protocol"]:
        return []
    names = kept["runs"].keys() & found["runs"].keys()
    one, other = (
        # Layouts are named by their digests, which the runs hold.
        facts
        | {"layouts": {}, "runs": {n: _sent(facts["runs"][n]) for n in sorted(names)}}
        for facts in (kept, found)
    )
    return [*list_differences(one, other)]


def _sent(run: Facts) -> Facts:
    """Return a run's facts without its exports, whose files lie in folders."""
    files = {name: key for name, key in run["files"].items() if "/" not in name}
    return run | {"files": files}


def main() -> int:
    """Run cases, or compare what two runs of this script have found."""
    parser = argparse.ArgumentParser(
        description="Make tiny runs and write down all that they compute."
    )
    names = f"which runs to make; else all: {', '.join(CASES)}"
    parser.add_argument("names", nargs="*", metavar="NAME", help=names)
    parser.add_argument("--out", type=Path, help="file to write; else standard output")
    stable = "write only what is the same on every machine"
    parser.add_argument("--stable", action="store_true", help=stable)
    compare = "print the differences of two files; exit with 1 if there are any"
    parser.add_argument("--compare", nargs=2, type=Path, metavar="FILE", help=compare)
    given = parser.parse_args()
    if unknown := set(given.names) - CASES.keys():
        parser.error(f"no such run: {', '.join(sorted(unknown))}")
    if given.compare:
        one, other = (json.loads(path.read_text()) for path in given.compare)
        differences = list(list_differences(one, other))
        print("\n".join(differences) or "no difference")
        return int(bool(differences))
    facts = run_cases(given.names or [*CASES])
    facts = keep_stable(facts) if given.stable else facts
    if given.stable and given.out and given.out.is_file():
        differences = must_raise(json.loads(given.out.read_text()), facts)
        if differences:
            print("\n".join([*differences, f"{given.out} stays as it is: {RAISE}"]))
            return 1
    text = json.dumps(facts, indent=1) + "\n"
    if given.out:
        given.out.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
