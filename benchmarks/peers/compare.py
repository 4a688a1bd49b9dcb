"""Compare the cost of a round with other frameworks, and write RESULTS.md.

python benchmarks/peers/compare.py [--examples 8 32] [--runs 5] [--peers NAME ...]

All sides train the same clients on the same batches from the same LoRA factors. Before
anything is timed, a short run without dropout checks that: the training losses of all
sides must agree. Each side is a process with one thread. They take turns, one round
each, so that other load on the machine affects all alike; a run is such a turn. The
first round of each is not counted. A ratio is that of two rounds in the same turn.

Peers are installed, each into a virtual environment of its own, below `--environments`;
they stay there for the next time.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from environments import SHARED, InstallError, make_environment, read_metadata

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results.json", HERE / "RESULTS.md"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
# The largest relative difference of training losses without dropout.
TOLERANCE = {"float32": 1e-5, "bf16": 1e-2, "auto": 1e-2}
# Peers without a side, and why.
ABSENT = {
    "FLUTE": "it is no package, but a repository from whose root its code is run",
    "BlazeFL": "version 3.0.0 needs Python 3.14, which slora-flwr does not run on yet",
}


@dataclass(frozen=True)
class Side:
    """A side of the comparison.

    Attributes
    ----------
    name : str
        What it is called.
    module : str
        Its file in `sides`.
    threads : int
        Number of threads.
    precision : str
        Its own precision; empty for that of the comparison.
    """

    name: str
    module: str
    threads: int = 1
    precision: str = ""

    @property
    def is_own(self) -> bool:
        """Whether it is slora-flwr."""
        return self.module == "slora_flwr"


CORES = os.cpu_count() or 1
SIDES = {
    "slora-flwr": Side("slora-flwr", "slora_flwr"),
    "slora-flwr-auto": Side(
        "slora-flwr, automatic precision", "slora_flwr", precision="auto"
    ),
    "pfl": Side("pfl-research", "pfl"),
    "usual-recipe": Side("the usual Flower recipe", "usual_recipe"),
    "plain": Side("plain PyTorch and PEFT", "plain"),
    "plain-cores": Side(f"plain PyTorch and PEFT, {CORES} threads", "plain", CORES),
    "fedlab": Side("FedLab", "fedlab"),
    "appfl": Side("APPFL", "appfl"),
    "fluke": Side("fluke", "fluke"),
}


class SideError(RuntimeError):
    """A side failed."""


class Child:
    """A side's process.

    Parameters
    ----------
    side : Side
        The side.
    python : Path
        The interpreter.
    work : Path
        The folder of its work.
    log : Path
        Where it writes what it says.
    """

    def __init__(self, side: Side, python: Path, work: Path, log: Path) -> None:
        self._name, self._log = side.name, log
        # What peers leave behind goes with the work.
        environment = {**os.environ, "TMPDIR": str(work)}
        environment["OMP_WAIT_POLICY"] = "passive"
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            environment[name] = str(side.threads)
        if python != Path(sys.executable):
            environment.pop("PYTHONPATH", None)
        command = [str(python), "-m", "side", side.module, str(work)]
        command += [side.precision] if side.precision else []
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command,
                cwd=HERE,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )

    def go_on(self) -> None:
        """Give it its turn."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `read` says why
            print(file=self._process.stdin, flush=True)

    def read(self) -> dict[str, Any]:
        """Return what it tells next."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            [*_, last] = ["", *self._log.read_text().splitlines()]
            raise SideError(f"{self._name} failed: {last}")
        told: dict[str, Any] = json.loads(line)
        return told

    def end(self) -> None:
        """End it, if it has not ended."""
        self._process.kill()
        self._process.communicate()


def run_config(options: argparse.Namespace) -> dict[str, Any]:
    """Return slora-flwr's run config for the work."""
    return {
        "method": "lora",
        "rounds": options.rounds,
        "model.name": options.model,
        "data.name": options.data,
        "data.max-length": options.length,
        # Rounds are not evaluated, but for the last, which is.
        "run.eval-every": 0,
        "data.max-test": 1,
        "clients.count": options.clients,
        "clients.per-round": options.clients,
        "clients.partitioner": "virtual",
        "clients.alpha": 1.0,
        "clients.examples": options.examples,
        "train.precision": options.precision,
    }


def make_work(folder: Path, options: argparse.Namespace, dropout: float | None) -> None:
    """Write the work into a folder, in a process of its own."""
    folder.mkdir()
    given = json.dumps({"config": run_config(options), "dropout": dropout})
    command = [sys.executable, "make_work.py", str(folder)]
    done = subprocess.run(
        command, cwd=HERE, input=given, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"make_work.py failed\n{done.stderr}")


@contextmanager
def start(pythons: dict[str, Path], work: Path) -> Iterator[dict[str, Child]]:
    """Start all sides on the work in a folder, and end them afterwards."""
    with ExitStack() as running:
        children = {}
        for key, python in pythons.items():
            children[key] = Child(SIDES[key], python, work, work / f"{key}.log")
            running.callback(children[key].end)
        yield children


def check(
    pythons: dict[str, Path], folder: Path, options: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return the losses of a short run without dropout, and why peers failed.

    Raises
    ------
    SystemExit
        If losses differ.
    SideError
        If slora-flwr fails.
    """
    short = argparse.Namespace(**{**vars(options), "rounds": 2, "clients": 2})
    make_work(folder, short, dropout=0.0)
    found: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    with start(pythons, folder) as children:
        for key, child in children.items():
            try:
                for _ in range(short.rounds):
                    child.read()
                    child.go_on()
                found[key] = child.read()["losses"]
            except SideError as error:
                if SIDES[key].is_own:
                    raise
                failed[SIDES[key].name] = str(error)
    for key, losses in found.items():
        [first, *_] = found.values()
        worst = difference(losses, first)
        if not worst <= TOLERANCE[SIDES[key].precision or options.precision]:
            raise SystemExit(
                f"{SIDES[key].name} does not do the same work: without dropout the "
                f"training losses of its rounds are {losses}, and {first} elsewhere"
            )
    return found, failed


def difference(losses: Iterable[float], others: Iterable[float]) -> float:
    """Return the largest relative difference of the losses of two sides."""
    pairs = zip(losses, others, strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def measure(
    pythons: dict[str, Path], folder: Path, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Return each side's seconds of every turn, its losses and its packages.

    Raises
    ------
    SideError
        If a side fails.
    """
    make_work(folder, options, dropout=None)
    turns: dict[str, list[dict[str, float]]] = {key: [] for key in pythons}
    with start(pythons, folder) as children:
        for child in children.values():
            child.read()  # the first round, while others start
        order = list(children)
        for turn in range(options.runs):
            print(f"{options.examples} examples, turn {turn + 1}", flush=True)
            first = turn % len(order)
            for key in order[first:] + order[:first]:
                children[key].go_on()
                turns[key].append(children[key].read())
        found = {}
        for key, child in children.items():
            child.go_on()
            found[key] = {"turns": turns[key], **child.read()}
    return found


def find_pythons(
    keys: Iterable[str], environments: Path
) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the interpreter of each side, and why peers have none."""
    found, failed = {}, {}
    for key in keys:
        metadata = read_metadata(HERE / "sides" / f"{SIDES[key].module}.py")
        if metadata is None:
            found[key] = Path(sys.executable)
            continue
        print(f"environment of {key}", flush=True)
        try:
            found[key] = make_environment(environments / key, metadata)
        except InstallError as error:
            failed[SIDES[key].name] = f"it cannot be installed here: {error}"
    return found, failed


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on beside the code."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": names[0] if names else platform.machine(),
        "cores": CORES,
        "load": os.getloadavg()[0],
        "system": platform.system(),
        "python": platform.python_version(),
    }


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Return the entry of a comparison for the page."""
    machine = describe_machine()
    pythons, absent = find_pythons(options.peers, options.environments)
    with tempfile.TemporaryDirectory() as name:
        losses, failed = check(pythons, Path(name) / "check", options)
        if options.check:
            return {"losses": losses, "absent": absent | failed}
        pythons = {key: python for key, python in pythons.items() if key in losses}
        sides = measure(pythons, Path(name) / "work", options)
    shown = {key: sides[key].pop("packages") for key in sides}
    for key, packages in shown.items():
        metadata = read_metadata(HERE / "sides" / f"{SIDES[key].module}.py")
        package = "" if metadata is None else metadata["tool"]["peers"]["package"]
        sides[key] |= {"name": SIDES[key].name, "version": packages.get(package, "")}
        sides[key]["own"] = SIDES[key].is_own
    [first, *_] = losses.values()
    plain = [key for key in losses if not SIDES[key].precision]
    return {
        "machine": machine,
        "versions": {name: next(iter(shown.values()))[name] for name in SHARED},
        "model": Path(options.model).name,
        "recipe": {
            name: getattr(options, name)
            for name in ("examples", "clients", "length", "precision", "runs")
        },
        "agree": max(difference(losses[key], first) for key in plain),
        "sides": sides,
        "absent": absent | failed | ABSENT,
    }


def write_page(entries: Iterable[dict[str, Any]]) -> str:
    """Return RESULTS.md."""
    return "\n".join([INTRODUCTION, *(line for e in entries for line in _section(e))])


INTRODUCTION = (
    "## A round in other frameworks\n\n"
    "Written by `benchmarks/peers/compare.py`, which says how. All sides train the "
    "same clients, all of them in every round, on the same batches of up to 16 texts "
    "from the same LoRA factors, of rank 8 on all linear layers, with the model's own "
    "dropout and AdamW. slora-flwr is measured as a user runs it, with "
    "`slora run --engine inline`: its messages, checkpoints and ledger are included. "
    "The usual Flower recipe has its ServerApp and ClientApps in one process: without "
    "Ray, and without waiting. Plain PyTorch trains the clients one after the other "
    "and takes the mean. Seconds are medians over the runs; ratios are medians, with "
    "the least and the greatest.\n"
)


def _section(entry: dict[str, Any]) -> Iterator[str]:
    recipe, machine, sides = entry["recipe"], entry["machine"], entry["sides"]
    versions = entry["versions"]
    agree = f"differed by {entry['agree']:.0e} at most" if entry["agree"] else "agreed"
    yield f"### {entry['model']}, {recipe['examples']} texts, {recipe['precision']}\n"
    yield (
        f"{machine['date']}; {machine['cores']} cores of {machine['processor']}, load "
        f"{machine['load']:.1f} before; {machine['system']}, Python "
        f"{machine['python']}, PyTorch {versions['torch']}, transformers "
        f"{versions['transformers']}, PEFT {versions['peft']}. {recipe['clients']} "
        f"clients of {recipe['examples']} texts of at most {recipe['length']} tokens; "
        f"{recipe['runs']} runs. Without dropout, the sides' training losses {agree}.\n"
    )
    own = {key: side for key, side in sides.items() if side["own"]}
    ratios = [f"{side['name']} / it: {of}" for side in own.values() for of in UNITS]
    seconds = [f"{of} seconds" for of in UNITS]
    yield _row("", *seconds, *ratios, "training loss of the last round")
    yield "|---" * (2 + len(seconds) + len(ratios)) + "|"
    for key, side in sides.items():
        cells = [f"{median(_of(side, unit)):.2f}" for unit in UNITS.values()]
        for other_key, other in own.items():
            for unit in UNITS.values():
                pairs = zip(_of(other, unit), _of(side, unit), strict=True)
                told = _spread([a / b for a, b in pairs])
                cells.append("" if key == other_key else told)
        name = f"{side['name']} {side['version']}".strip()
        yield _row(name, *cells, f"{side['losses'][-1]:.4f}")
    yield ""
    for name, reason in entry["absent"].items():
        yield f"- Not measured: {name}; {reason}."
    yield ""


UNITS = {"CPU": "cpu", "wall": "wall"}


def _of(side: dict[str, Any], unit: str) -> list[float]:
    return [turn[unit] for turn in side["turns"]]


def _spread(ratios: list[float]) -> str:
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Compare, and write the results and their page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    assets = os.environ.get("SLORA_ASSETS", "")
    model = Path(assets) / "models" / "minilm-l6-h384-uncased"
    parser.add_argument("--model", default=str(model) if assets else "embedded")
    parser.add_argument("--data", default="stdlib-docs")
    parser.add_argument("--peers", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--examples", type=int, nargs="+", default=[32, 8])
    parser.add_argument("--clients", type=int, default=10, help="all in every round")
    parser.add_argument("--length", type=int, default=32, help="tokens per text")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument(
        "--environments", type=Path, default=CACHE / "slora-flwr" / "peers"
    )
    parser.add_argument(
        "--check", action="store_true", help="print the losses without dropout alone"
    )
    options = parser.parse_args()
    options.rounds = options.runs + 1
    options.environments = options.environments.absolute()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for examples in options.examples:
        one = argparse.Namespace(**{**vars(options), "examples": examples})
        try:
            entry = compare(one)
        except SideError as error:
            raise SystemExit(str(error)) from error
        if options.check:
            print(json.dumps(entry))
            continue
        key = f"{entry['model']}, {examples}, {options.precision}"
        results[key] = entry
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        PAGE.write_text(write_page(results.values()))


if __name__ == "__main__":
    main()
