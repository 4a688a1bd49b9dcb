"""Write the vectors: inputs drawn from each case's name, answers by dense formulas.

python -m fedlora_conformance.generate FOLDER

All operations are elementwise in float64 or exact. BLAS and LAPACK are not used, since
their last bits depend on the machine: the files are the same everywhere, byte for byte.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

TOLERANCE = 1e-6
# A trap is not listed if its answer is nearer than this to the right one or to another
# trap's.
VISIBLE = 1e-4
# Decimals of the traps' answers, enough for comparison within the tolerance.
DECIMALS = 7


@dataclass(frozen=True)
class Factors:
    """A layer's A, shape (rank, in), and B, shape (out, rank)."""

    a: Matrix
    b: Matrix


@dataclass(frozen=True)
class Client:
    """One client's answer."""

    examples: int
    layers: dict[str, Factors]
    head: Matrix


@dataclass(frozen=True)
class Round:
    """A round: answers, examples of clients without one, and the trained factors."""

    clients: list[Client]
    unanswered: Sequence[int]
    trains: str


@dataclass(frozen=True)
class State:
    """The server's state: base weights, factors and head."""

    base: dict[str, Matrix]
    layers: dict[str, Factors]
    head: Matrix


@dataclass(frozen=True)
class Server:
    """How rounds are aggregated, including everything that a trap changes.

    Parameters
    ----------
    aggregator : str
        An aggregator listed in the README.
    scaling, rank_scaling : float
        s, and alpha / rank regardless of the rule for s.
    residual_scaling : float
        Factor of the residual when it is added to the base.
    accumulates : bool
        True if the residual is added to the last base, False for the first one.
    transposes : bool
        True if square residuals are transposed.
    loses_root : bool
        True if FlexLoRA's B holds the square roots of the singular values.
    read : Callable
        Changes a round before it is aggregated.
    """

    aggregator: str
    scaling: float
    rank_scaling: float
    residual_scaling: float
    accumulates: bool = True
    transposes: bool = False
    loses_root: bool = False
    read: Callable[[State, Round], Round] = lambda state, current: current


def product(factors: Factors) -> Matrix:
    """Compute B·A, one rank after the other."""
    terms = (np.outer(b, a) for b, a in zip(factors.b.T, factors.a, strict=True))
    return sum(terms, np.zeros((len(factors.b), factors.a.shape[1])))


def weighted_mean(values: Iterable[Matrix], examples: Sequence[int]) -> Matrix:
    """Compute Σ n_i·x_i / Σ n_i."""
    terms = [n * value for value, n in zip(values, examples, strict=True)]
    return sum(terms[1:], terms[0]) / sum(examples)


def mean_of_rows(
    sent: Matrix, values: Sequence[Matrix], examples: Sequence[int]
) -> Matrix:
    """Average each row over the clients that have it; other rows stay as sent."""
    mean = sent.copy()
    for row in range(len(sent)):
        having = [i for i, value in enumerate(values) if row < len(value)]
        if having:
            mean[row] = weighted_mean(
                [values[i][row] for i in having], [examples[i] for i in having]
            )
    return mean


def mean_factors(
    sent: Factors, results: Sequence[Factors], examples: Sequence[int], trains: str
) -> Factors:
    """Average the trained factors, each rank over the clients that have it."""
    a, b = sent.a, sent.b
    if "A" in trains:
        a = mean_of_rows(a, [result.a for result in results], examples)
    if "B" in trains:
        b = mean_of_rows(b.T, [result.b.T for result in results], examples).T
    return Factors(a, b)


def singular_factors(matrix: Matrix) -> tuple[Matrix, Matrix, list[float]]:
    """Decompose M = L·Rᵀ, L = U·S and R = V, by one-sided Jacobi rotations.

    Returns
    -------
    tuple
        L and R, with columns in descending order of the singular values, and these.
    """
    left, right = matrix.copy(), np.eye(matrix.shape[1])
    negligible = 1e-15 * _dot(left, left)
    rotated = True
    while rotated:
        rotated = False
        for p, q in combinations(range(matrix.shape[1]), 2):
            overlap = _dot(left[:, p], left[:, q])
            if abs(overlap) <= negligible:
                continue
            rotated = True
            difference = _dot(left[:, q], left[:, q]) - _dot(left[:, p], left[:, p])
            zeta = difference / (2 * overlap)
            tangent = math.copysign(1, zeta) / (abs(zeta) + math.sqrt(1 + zeta * zeta))
            cosine = 1 / math.sqrt(1 + tangent * tangent)
            sine = cosine * tangent
            for columns in (left, right):
                x, y = columns[:, p].copy(), columns[:, q].copy()
                columns[:, p] = cosine * x - sine * y
                columns[:, q] = sine * x + cosine * y
    values = [math.sqrt(_dot(column, column)) for column in left.T]
    order = sorted(range(len(values)), key=lambda j: -values[j])
    return left[:, order], right[:, order], [values[j] for j in order]


def _dot(x: Matrix, y: Matrix) -> float:
    return math.fsum((x * y).ravel().tolist())


def aggregate(server: Server, start: State, before: State, current: Round) -> State:
    """Return the state after one round; `start` is the state before the first."""
    current = server.read(before, current)
    examples = [client.examples for client in current.clients]
    base, layers = {}, {}
    for name, sent in before.layers.items():
        results = [client.layers[name] for client in current.clients]
        base[name] = before.base[name]
        layers[name] = mean_factors(sent, results, examples, current.trains)
        mean_product = weighted_mean(map(product, results), examples)
        if server.aggregator == "exact":
            residual = mean_product - product(layers[name])
            if server.transposes and len(residual) == residual.shape[1]:
                residual = residual.T
            under = before if server.accumulates else start
            base[name] = under.base[name] + server.residual_scaling * residual
        if server.aggregator == "flexlora":
            rank = len(sent.a)
            left, right, values = singular_factors(mean_product)
            b = left[:, :rank]
            if server.loses_root:
                b = b / np.sqrt(values[:rank])
            layers[name] = Factors(right[:, :rank].T, b)
    head = weighted_mean([client.head for client in current.clients], examples)
    return State(base, layers, head)


def aggregate_all(server: Server, start: State, rounds: Iterable[Round]) -> list[State]:
    """Return the state after each round."""
    states = [start]
    for current in rounds:
        states.append(aggregate(server, start, states[-1], current))
    return states[1:]


def effective(state: State, scaling: float) -> dict[str, Matrix]:
    """Compute W + s·B·A of each layer."""
    return {
        name: state.base[name] + scaling * product(factors)
        for name, factors in state.layers.items()
    }


def forget_weights(state: State, current: Round) -> Round:
    """Give every client the weight 1."""
    clients = [replace(client, examples=1) for client in current.clients]
    return replace(current, clients=clients)


def pad(state: State, current: Round) -> Round:
    """Pad factors with zeros to the server's rank, and count the zeros as values."""

    def padded(factors: Factors, rank: int) -> Factors:
        missing = rank - len(factors.a)
        return Factors(
            np.pad(factors.a, ((0, missing), (0, 0))),
            np.pad(factors.b, ((0, 0), (0, missing))),
        )

    return _change_layers(
        current, lambda name, factors: padded(factors, len(state.layers[name].a))
    )


def scale_by_own_rank(state: State, current: Round) -> Round:
    """Scale each client by the s of its own rank."""
    return _change_layers(
        current,
        lambda name, factors: replace(
            factors, b=factors.b * (len(state.layers[name].a) / len(factors.a))
        ),
    )


def _change_layers(current: Round, change: Callable[[str, Factors], Factors]) -> Round:
    clients = [
        replace(
            client,
            layers={name: change(name, f) for name, f in client.layers.items()},
        )
        for client in current.clients
    ]
    return replace(current, clients=clients)


def answer_unchanged(state: State, current: Round) -> Round:
    """Count clients without an answer as returning what they were sent."""
    added = [Client(n, state.layers, state.head) for n in current.unanswered]
    return replace(current, clients=[*current.clients, *added])


def answer_zero(state: State, current: Round) -> Round:
    """Count clients without an answer as returning zeros."""
    zeros = {
        name: Factors(np.zeros_like(factors.a), np.zeros_like(factors.b))
        for name, factors in state.layers.items()
    }
    added = [Client(n, zeros, 0 * state.head) for n in current.unanswered]
    return replace(current, clients=[*current.clients, *added])


def swap_turns(state: State, current: Round) -> Round:
    """Aggregate the factor that was not trained."""
    swapped = {"A": "B", "B": "A"}.get(current.trains, current.trains)
    return replace(current, trains=swapped)


# Each trap is tried on every case, and listed where it makes a difference.
TRAPS: dict[str, Callable[[Server], Server]] = {
    "unweighted mean": lambda server: replace(server, read=forget_weights),
    "scaling left out": lambda server: replace(
        server, scaling=1.0, residual_scaling=1.0
    ),
    "scaling applied twice": lambda server: replace(
        server,
        scaling=server.scaling * server.scaling,
        residual_scaling=server.scaling * server.scaling,
    ),
    "alpha / rank for alpha / sqrt(rank)": lambda server: replace(
        server, scaling=server.rank_scaling, residual_scaling=server.rank_scaling
    ),
    "A and B averaged apart": lambda server: replace(server, aggregator="fedavg"),
    "scaling left out of the residual": lambda server: replace(
        server, residual_scaling=1.0
    ),
    "scaling applied twice to the residual": lambda server: replace(
        server, residual_scaling=server.scaling * server.scaling
    ),
    "residual transposed": lambda server: replace(server, transposes=True),
    "residual forgotten in the next round": lambda server: replace(
        server, accumulates=False
    ),
    "a square root of the singular values lost": lambda server: replace(
        server, loses_root=True
    ),
    "zero padding divided by all clients": lambda server: replace(server, read=pad),
    "each client's own rank in the scaling": lambda server: replace(
        server, read=scale_by_own_rank
    ),
    "unanswered clients counted as unchanged": lambda server: replace(
        server, read=answer_unchanged
    ),
    "unanswered clients counted as zero": lambda server: replace(
        server, read=answer_zero
    ),
    "the other factor's turn": lambda server: replace(server, read=swap_turns),
}


@dataclass(frozen=True)
class Draw:
    """A round before its numbers are drawn.

    Parameters
    ----------
    examples : Sequence[int]
        Number of examples of each client that answers.
    unanswered : Sequence[int]
        Number of examples of each client that was asked and did not answer.
    ranks : Sequence[int]
        Rank of each client that answers; empty for the case's rank.
    trains : str
        The factors that are trained: AB, A or B.
    identical : bool
        True if all clients return the same.
    """

    examples: Sequence[int]
    unanswered: Sequence[int] = ()
    ranks: Sequence[int] = ()
    trains: str = "AB"
    identical: bool = False


@dataclass(frozen=True)
class Plan:
    """A case before its numbers are drawn; its name starts with the aggregator."""

    name: str
    tests: str
    shapes: dict[str, tuple[int, int]]
    alpha: float
    rank: int
    rounds: Sequence[Draw]
    root: bool = False
    zero_b: bool = False

    @property
    def aggregator(self) -> str:
        """The aggregator that the case tests."""
        return next(name for name in AGGREGATORS if self.name.startswith(name))


AGGREGATORS = ("fedavg", "ffa", "alternate", "exact", "flexlora", "zero-padding")
WIDE = {"query": (4, 7)}
TALL = {"output": (7, 3)}
SQUARE = {"key": (5, 5)}
SEVERAL = {"query": (3, 5), "key": (3, 3), "output": (5, 3)}

PLANS = (
    Plan(
        "fedavg-unequal-weights",
        "means of A, of B and of the head, weighted by examples",
        WIDE,
        8,
        2,
        [Draw((3, 10, 27))],
    ),
    Plan(
        "fedavg-one-client",
        "the mean of one client is that client, whatever its weight",
        TALL,
        16,
        1,
        [Draw((37,))],
    ),
    Plan(
        "fedavg-very-unequal-weights",
        "1 example against 1317, as under strong skew; s from the root of the rank",
        TALL,
        4,
        3,
        [Draw((1, 1317))],
        root=True,
    ),
    Plan(
        "fedavg-several-layers",
        "two rounds over three layers, wide, square and tall",
        SEVERAL,
        6,
        2,
        [Draw((5, 8)), Draw((21, 2, 9))],
        root=True,
    ),
    Plan(
        "fedavg-partial-cohort",
        "who did not answer has no part in the mean, neither as zero nor as sent",
        WIDE,
        4,
        2,
        [Draw((12, 5), unanswered=(40, 9)), Draw((7, 20), unanswered=(11,))],
    ),
    Plan(
        "fedavg-zero-b",
        "B is zero at the start, as in LoRA's own",
        WIDE,
        8,
        2,
        [Draw((6, 14))],
        zero_b=True,
    ),
    Plan(
        "ffa-unequal-weights",
        "A is frozen: the mean of B is exact",
        WIDE,
        8,
        2,
        [Draw((3, 10, 27), trains="B")],
    ),
    Plan(
        "ffa-partial-cohort",
        "two rounds over a tall layer, some clients silent; A never changes",
        TALL,
        6,
        2,
        [
            Draw((15, 4), unanswered=(30,), trains="B"),
            Draw((9, 1), unanswered=(2,), trains="B"),
        ],
        root=True,
    ),
    Plan(
        "ffa-zero-b",
        "B is zero at the start, and one client holds most examples",
        WIDE,
        16,
        1,
        [Draw((1, 1317), trains="B")],
        zero_b=True,
    ),
    Plan(
        "alternate-b",
        "B's turn: B is averaged, A stays",
        WIDE,
        8,
        2,
        [Draw((3, 10, 27), trains="B")],
    ),
    Plan(
        "alternate-a",
        "A's turn: A is averaged, B stays",
        TALL,
        8,
        2,
        [Draw((3, 10, 27), trains="A")],
    ),
    Plan(
        "alternate-three-rounds",
        "B's, A's and B's turn again, on the means that the turns before left",
        TALL,
        6,
        2,
        [
            Draw((5, 8), trains="B"),
            Draw((2, 30), trains="A"),
            Draw((17, 4, 6), trains="B"),
        ],
        root=True,
        zero_b=True,
    ),
    Plan(
        "alternate-partial-cohort",
        "A's turn in several layers; who did not answer has no part in the mean",
        SEVERAL,
        4,
        2,
        [Draw((12, 5), unanswered=(25,), trains="A")],
    ),
    Plan(
        "exact-unequal-weights",
        "the effective weight is the mean of the clients': the residual is in the base",
        WIDE,
        8,
        2,
        [Draw((3, 10, 27))],
    ),
    Plan(
        "exact-very-unequal-weights",
        "1 example against 1317; s from the root of the rank",
        TALL,
        4,
        2,
        [Draw((1, 1317))],
        root=True,
    ),
    Plan(
        "exact-one-client",
        "one client's means are its factors: the residual is zero",
        WIDE,
        8,
        2,
        [Draw((37,))],
    ),
    Plan(
        "exact-identical-clients",
        "clients that agree leave no residual",
        TALL,
        6,
        2,
        [Draw((3, 10, 27), identical=True)],
    ),
    Plan(
        "exact-zero-b",
        "B is zero at the start; the residual is not, after the round",
        WIDE,
        16,
        1,
        [Draw((6, 14))],
        zero_b=True,
    ),
    Plan(
        "exact-three-rounds",
        "the base moves each round, and the next stands on it",
        TALL,
        6,
        2,
        [Draw((5, 8)), Draw((2, 30, 11)), Draw((17, 4))],
    ),
    Plan(
        "exact-many-ranks",
        "4 clients of rank 2 over a matrix of rank 3: the residual has full rank",
        TALL,
        4,
        2,
        [Draw((4, 9, 2, 16))],
    ),
    Plan(
        "exact-square",
        "a square layer, which does not show by its shape that it is transposed",
        SQUARE,
        8,
        2,
        [Draw((11, 6))],
    ),
    Plan(
        "exact-partial-cohort",
        "the residual, too, is of those who answered",
        WIDE,
        4,
        2,
        [Draw((12, 5), unanswered=(40, 9))],
        root=True,
    ),
    Plan(
        "exact-several-layers",
        "two rounds over three layers, each with a base of its own",
        SEVERAL,
        6,
        2,
        [Draw((5, 8)), Draw((21, 2, 9))],
    ),
    Plan(
        "flexlora-unequal-weights",
        "the best approximation of the mean of B·A at the rank",
        WIDE,
        8,
        2,
        [Draw((3, 10, 27))],
    ),
    Plan(
        "flexlora-very-unequal-weights",
        "1 example against 1317; s from the root of the rank",
        TALL,
        4,
        2,
        [Draw((1, 1317))],
        root=True,
    ),
    Plan(
        "flexlora-unequal-ranks",
        "clients of ranks 1, 2 and 3, one s for all, cut at 3",
        WIDE,
        6,
        3,
        [Draw((8, 9, 15), ranks=(1, 2, 3))],
    ),
    Plan(
        "flexlora-mean-below-rank",
        "two clients of rank 1, a server of rank 3: there is nothing to cut",
        TALL,
        6,
        3,
        [Draw((4, 13), ranks=(1, 1))],
    ),
    Plan(
        "flexlora-partial-cohort",
        "the mean of B·A, too, is of those who answered",
        TALL,
        8,
        2,
        [Draw((12, 5), unanswered=(40, 9))],
    ),
    Plan(
        "flexlora-many-ranks",
        "4 clients of rank 2 over a matrix of rank 3",
        TALL,
        8,
        2,
        [Draw((4, 9, 2, 16))],
    ),
    Plan(
        "flexlora-zero-b",
        "B is zero at the start; the one client's product has the rank already",
        WIDE,
        16,
        1,
        [Draw((37,))],
        zero_b=True,
    ),
    Plan(
        "flexlora-several-layers",
        "two rounds over three layers, each with a decomposition of its own",
        SEVERAL,
        6,
        2,
        [Draw((5, 8)), Draw((21, 2, 9))],
    ),
    Plan(
        "zero-padding-unequal-ranks",
        "clients of ranks 1, 2 and 3: each rank's mean is over those who have it",
        WIDE,
        6,
        3,
        [Draw((14, 9, 5), ranks=(1, 2, 3))],
    ),
    Plan(
        "zero-padding-very-unequal-weights",
        "the one client of rank 3 has 1 example: its third rank is the mean",
        TALL,
        4,
        3,
        [Draw((1, 1317), ranks=(3, 1))],
        root=True,
    ),
    Plan(
        "zero-padding-equal-ranks",
        "where all ranks are the server's this is fedavg",
        WIDE,
        8,
        2,
        [Draw((3, 10, 27))],
    ),
    Plan(
        "zero-padding-rank-unanswered",
        "no client of rank 3 answered: the third rank stays as it was sent",
        WIDE,
        6,
        3,
        [Draw((8, 5), ranks=(2, 1), unanswered=(20,))],
    ),
    Plan(
        "zero-padding-several-layers",
        "two rounds over three layers, other ranks in the second",
        SEVERAL,
        6,
        3,
        [Draw((5, 8), ranks=(1, 3)), Draw((21, 2, 9), ranks=(2, 2, 3))],
    ),
)


class Numbers:
    """Short binary fractions, exact even in bfloat16, from a stable random stream.

    NumPy guarantees the raw bits of Philox, but not the values of its generator.
    """

    def __init__(self, seed: str) -> None:
        key = blake2b(seed.encode(), digest_size=16).digest()
        self._stream = np.random.Philox(key=int.from_bytes(key, "big"))

    def draw(self, shape: tuple[int, int], largest: int) -> Matrix:
        """Draw whole multiples of 1/64, of magnitude up to `largest` / 64."""
        words = self._stream.random_raw(math.prod(shape)) % (2 * largest + 1)
        return (words.astype(np.float64) - largest).reshape(shape) / 64


def draw_start(plan: Plan, numbers: Numbers) -> State:
    """Draw base weights, factors and head."""
    base, layers = {}, {}
    for name, (rows, columns) in plan.shapes.items():
        base[name] = numbers.draw((rows, columns), 64)
        b = numbers.draw((rows, plan.rank), 0 if plan.zero_b else 64)
        layers[name] = Factors(numbers.draw((plan.rank, columns), 64), b)
    return State(base, layers, numbers.draw((2, 3), 64))


def draw_round(draw: Draw, start: State, sent: State, numbers: Numbers) -> Round:
    """Draw clients around the start; factors that they do not train stay as sent."""
    clients: list[Client] = []
    for index, examples in enumerate(draw.examples):
        if draw.identical and clients:
            clients.append(replace(clients[0], examples=examples))
            continue
        layers = {}
        for name, factors in start.layers.items():
            rank = draw.ranks[index] if draw.ranks else len(factors.a)
            a, b = sent.layers[name].a, sent.layers[name].b
            if "A" in draw.trains:
                a = factors.a + numbers.draw(factors.a.shape, 48)
            if "B" in draw.trains:
                b = factors.b + numbers.draw(factors.b.shape, 48)
            layers[name] = Factors(a[:rank], b[:, :rank])
        head = start.head + numbers.draw(start.head.shape, 48)
        clients.append(Client(examples, layers, head))
    return Round(clients, draw.unanswered, draw.trains)


def make_case(plan: Plan) -> dict[str, Any]:
    """Draw a case, and compute its right answer and those of its traps."""
    rank_scaling = plan.alpha / plan.rank
    scaling = plan.alpha / math.sqrt(plan.rank) if plan.root else rank_scaling
    server = Server(plan.aggregator, scaling, rank_scaling, scaling)
    numbers = Numbers(plan.name)
    start = draw_start(plan, numbers)
    rounds, states = [], [start]
    for draw in plan.rounds:
        rounds.append(draw_round(draw, start, states[-1], numbers))
        states.append(aggregate(server, start, states[-1], rounds[-1]))
    expected = [
        _expected(plan.aggregator, scaling, state, current)
        for state, current in zip(states[1:], rounds, strict=True)
    ]
    traps = [
        _trap(name, change(server), start, rounds) for name, change in TRAPS.items()
    ]
    return {
        "name": plan.name,
        "tests": plan.tests,
        "aggregator": plan.aggregator,
        "scaling": {
            "s": scaling,
            "alpha": plan.alpha,
            "rank": plan.rank,
            "rule": "alpha / sqrt(rank)" if plan.root else "alpha / rank",
        },
        "tolerance": TOLERANCE,
        "start": {
            "layers": {
                name: {"W": start.base[name], "A": factors.a, "B": factors.b}
                for name, factors in start.layers.items()
            },
            "head": start.head,
        },
        "rounds": [_round(current) for current in rounds],
        "expected": expected,
        "wrong": _visible(expected, traps),
    }


def _round(current: Round) -> dict[str, Any]:
    return {
        "trains": list(current.trains),
        "clients": [
            {
                "examples": client.examples,
                "rank": len(next(iter(client.layers.values())).a),
                "layers": {name: _named(f) for name, f in client.layers.items()},
                "head": client.head,
            }
            for client in current.clients
        ],
        "unanswered": list(current.unanswered),
    }


def _named(factors: Factors) -> dict[str, Matrix]:
    return {"A": factors.a, "B": factors.b}


def _expected(
    aggregator: str, scaling: float, state: State, current: Round
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "effective": effective(state, scaling),
        "head": state.head,
    }
    # Factors of a product are not unique: any that multiply to it are right.
    if aggregator != "flexlora":
        found["mean"] = {name: _named(f) for name, f in state.layers.items()}
    if aggregator == "exact":
        examples = [client.examples for client in current.clients]
        found["residual"] = {
            name: weighted_mean(
                [product(client.layers[name]) for client in current.clients], examples
            )
            - product(factors)
            for name, factors in state.layers.items()
        }
    return found


def _trap(
    name: str, server: Server, start: State, rounds: Iterable[Round]
) -> dict[str, Any]:
    scaling, states = server.scaling, aggregate_all(server, start, rounds)
    return {
        "trap": name,
        "effective": [
            {name: w.round(DECIMALS) for name, w in effective(state, scaling).items()}
            for state in states
        ],
        "head": [state.head.round(DECIMALS) for state in states],
    }


def _visible(
    expected: list[dict[str, Any]], traps: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the traps that differ from the right answer, in layers or in the head."""
    kept: list[dict[str, Any]] = []
    for trap in traps:
        shown = {"trap": trap["trap"]}
        for part in ("effective", "head"):
            right = [answer[part] for answer in expected]
            others = [right, *(other[part] for other in kept if part in other)]
            if all(_differ(trap[part], other) for other in others):
                shown[part] = trap[part]
        if len(shown) > 1:
            kept.append(shown)
    return kept


def _differ(found: list[Any], other: list[Any]) -> bool:
    pairs = zip(_flat(found), _flat(other), strict=True)
    return max(float(abs(x - y).max() / abs(y).max()) for x, y in pairs) > VISIBLE


def _flat(rounds: list[Any]) -> list[Matrix]:
    layers = (r.values() if isinstance(r, dict) else [r] for r in rounds)
    return [matrix for found in layers for matrix in found]


def to_text(case: dict[str, Any]) -> str:
    """Return a case as JSON with one line per row of a matrix; floats by their repr."""
    # Adding 0 turns -0.0 into 0.0.
    text = json.dumps(
        case,
        indent=1,
        allow_nan=False,
        default=lambda matrix: (matrix + 0.0).tolist(),
    )
    rows = re.compile(r"\[\s+([^\[\]{}]+?)\s+\]")
    return rows.sub(lambda row: "[" + re.sub(r"\s+", " ", row[1]) + "]", text) + "\n"


def write(folder: Path) -> None:
    """Write the files of all cases into a folder that exists."""
    for plan in PLANS:
        path = folder / f"{plan.name}.json"
        path.write_text(to_text(make_case(plan)), newline="\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
