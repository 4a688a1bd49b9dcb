"""Check an implementation of aggregators of federated LoRA against the vectors."""

import argparse
import importlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Case = dict[str, Any]
Answer = list[dict[str, Any]]
Implementation = Callable[[Case], Answer]
# Round, layer (empty for the head), matrix.
Place = tuple[int, str, NDArray[np.float64]]

VECTORS = Path(__file__).parent / "vectors"


class AnswerError(ValueError):
    """An answer cannot be compared; the message says why."""


@dataclass(frozen=True)
class Part:
    """The error of an answer's layers, or of its head.

    Parameters
    ----------
    name : str
        `layers` or `head`.
    error : float
        The largest error over rounds and matrices, each relative to the right matrix's
        largest entry.
    passes : bool
        True if the error is within the case's tolerance.
    trap : str
        The trap that yields this answer; empty if none does.
    """

    name: str
    error: float
    passes: bool
    trap: str = ""

    def __str__(self) -> str:
        known = f": {self.trap}" if self.trap else ""
        return f"{self.name} off by {self.error:.1e}{known}"


@dataclass(frozen=True)
class Result:
    """How an implementation did on a case.

    Parameters
    ----------
    case, aggregator : str
        The case's name, and the aggregator that it tests.
    verdict : str
        `ok`, `FAILED` or `not offered`.
    parts : tuple of Part
        The errors of layers and head; empty without an answer that compares.
    problem : str
        Why there is none, if the case failed for that.
    """

    case: str
    aggregator: str
    verdict: str
    parts: tuple[Part, ...] = ()
    problem: str = ""

    @property
    def note(self) -> str:
        """What the runner prints beside the verdict."""
        off = [str(part) for part in self.parts if not part.passes]
        if off or not self.parts:
            return ", ".join(off) or self.problem
        return f"{max(part.error for part in self.parts):.1e}"

    def to_json(self) -> dict[str, Any]:
        """Return the result for a JSON file; an error that is not finite is null."""
        parts = [
            {
                "name": part.name,
                "error": part.error if math.isfinite(part.error) else None,
                "passes": part.passes,
                "trap": part.trap,
            }
            for part in self.parts
        ]
        return {
            "case": self.case,
            "aggregator": self.aggregator,
            "verdict": self.verdict,
            "parts": parts,
            "problem": self.problem,
        }


def load() -> dict[str, Case]:
    """Return all cases by name, with matrices as float64 arrays."""
    cases = (
        json.loads(path.read_text(), object_hook=_with_arrays)
        for path in sorted(VECTORS.glob("*.json"))
    )
    return {case["name"]: case for case in cases}


def _with_arrays(found: dict[str, Any]) -> dict[str, Any]:
    # Matrices are the only lists of lists.
    return {
        key: np.array(value)
        if isinstance(value, list) and value and isinstance(value[0], list)
        else value
        for key, value in found.items()
    }


def check(case: Case, answer: Answer) -> list[Part]:
    """Compare an answer with the right one and, if it is wrong, with the traps'.

    Raises
    ------
    AnswerError
        If the answer lacks a matrix, or one has the wrong shape.
    """
    expected = case["expected"]
    if len(answer) != len(expected):
        raise AnswerError(f"{len(answer)} rounds in the answer, not {len(expected)}")
    parts = []
    for name, key in (("layers", "effective"), ("head", "head")):
        right = list(_places([found[key] for found in expected]))
        given = list(_given(key, answer, right))
        error = _error(given, right)
        if error <= case["tolerance"]:
            parts.append(Part(name, error, True))
            continue
        traps = (
            wrong["trap"]
            for wrong in case["wrong"]
            if key in wrong
            and _error(given, list(_places(wrong[key]))) <= case["tolerance"]
        )
        parts.append(Part(name, error, False, next(traps, "")))
    return parts


def _places(rounds: list[Any]) -> Iterator[Place]:
    """Yield the matrices of each round's layers, or of its head."""
    for number, found in enumerate(rounds, start=1):
        layers = found if isinstance(found, dict) else {"": found}
        for layer, matrix in layers.items():
            yield number, layer, matrix


def _given(key: str, answer: Answer, right: list[Place]) -> Iterator[Place]:
    """Yield the answer's matrices in the order of the right ones."""
    for number, layer, matrix in right:
        place = f"round {number}, {layer or key}"
        try:
            found = answer[number - 1][key]
            given = np.asarray(found[layer] if layer else found, dtype=np.float64)
        except KeyError as error:
            raise AnswerError(f"{place}: the answer has no {error}") from None
        if given.shape != matrix.shape:
            raise AnswerError(f"{place}: shape {given.shape}, not {matrix.shape}")
        yield number, layer, given


def _error(given: list[Place], right: list[Place]) -> float:
    errors = [
        np.abs(found - matrix).max() / np.abs(matrix).max()
        for (_, _, found), (_, _, matrix) in zip(given, right, strict=True)
    ]
    # Not max(), which can ignore NaN.
    return float(np.max(errors))


def find(text: str) -> Implementation:
    """Return MODULE:FUNCTION, also imported from the working directory."""
    module, _, function = text.partition(":")
    sys.path.insert(0, "")
    try:
        found: Implementation = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not MODULE:FUNCTION: {error}"
        ) from None
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print a line per case, and return 1 if any fails, otherwise 0."""
    cases = load()
    parser = argparse.ArgumentParser("fedlora-conformance", description=__doc__)
    parser.add_argument("implementation", metavar="MODULE:FUNCTION", type=find)
    parser.add_argument("--only", metavar="NAME", choices=cases, help="one case")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write results here")
    options = parser.parse_args(arguments)
    if options.only:
        cases = {options.only: cases[options.only]}
    results = []
    for case in cases.values():
        result = judge(options.implementation, case)
        results.append(result)
        print(f"{result.verdict:<11}  {result.case:<34}  {result.note}".rstrip())
    counts = Counter(result.verdict for result in results)
    verdicts = ("ok", "FAILED", "not offered")
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in verdicts))
    declined = {r.aggregator for r in results if r.verdict == "not offered"}
    if declined:
        print("not offered:", ", ".join(sorted(declined)))
    if options.json:
        found = [result.to_json() for result in results]
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if counts["FAILED"] else 0


def judge(implementation: Implementation, case: Case) -> Result:
    """Run an implementation on a case and compare its answer."""
    answers = ("expected", "wrong", "tests")
    problem = {key: value for key, value in case.items() if key not in answers}
    about = case["name"], case["aggregator"]
    try:
        parts = check(case, implementation(problem))
    except NotImplementedError:
        return Result(*about, "not offered")
    # One broken case must not hide the results of others.
    except Exception as error:
        return Result(*about, "FAILED", problem=f"{type(error).__name__}: {error}")
    passes = all(part.passes for part in parts)
    return Result(*about, "ok" if passes else "FAILED", tuple(parts))
