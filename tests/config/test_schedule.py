"""Schedules: phases of methods, and when an open one ends."""

import pytest

from slora_flwr.config import parse
from slora_flwr.config.methods import METHODS
from slora_flwr.config.schedule import has_stopped_gaining, make_schedule

FLAT = [0.5] * 9


@pytest.mark.parametrize(
    ("figures", "ends_after"),
    [
        # The best is three rounds old.
        ([[0.1, 0.2, 0.3, 0.3, 0.3, 0.3]], 6),
        # A gain of less than a point is none, even if it goes on.
        ([[0.1, 0.105, 0.109, 0.1095]], 4),
        # A point over the best, not over the round before.
        ([[0.3, 0.1, 0.2, 0.25, 0.4]], 4),
        # Either figure keeps the phase open.
        ([FLAT, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.6, 0.6]], 9),
        ([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.6, 0.6], FLAT], 9),
        ([FLAT], 4),
    ],
)
def test_an_open_phase_ends_when_nothing_has_gained(
    figures: list[list[float]], ends_after: int
) -> None:
    ended = [
        n
        for n in range(1, len(figures[0]) + 1)
        if has_stopped_gaining(*(series[:n] for series in figures))
    ]
    assert ended[0] == ends_after


@pytest.mark.parametrize("method", METHODS)
def test_phases_have_all_rounds(method: str) -> None:
    phases = make_schedule(parse({"method": method, "rounds": 12}))
    assert sum(phase.rounds for phase in phases) == 12
    assert not any(phase.is_open for phase in phases)
    assert [p.primed for p in phases] == [False, True][: len(phases)] or (
        method == "head-lora" and not any(p.primed for p in phases)
    )


def test_an_open_phase_has_half_of_the_rounds_at_most() -> None:
    first, second = make_schedule(parse({"sparse.rounds": 0, "rounds": 11}))
    assert (first.rounds, first.is_open) == (5, True)
    assert (second.rounds, second.is_open) == (6, False)


@pytest.mark.parametrize(
    ("method", "aggregator", "moves"),
    [
        ("lora", "fedavg", False),
        ("ffa-lora", "ffa", False),
        ("alternate-lora", "alternate", False),
        ("fedex-lora", "exact", True),
        ("flexlora", "flexlora", False),
    ],
)
def test_aggregators_of_methods(method: str, aggregator: str, moves: bool) -> None:
    [phase] = make_schedule(parse({"method": method}))
    assert (phase.adapter, phase.aggregator) == ("lora", aggregator)
    assert phase.changes_base == moves
    _, second = make_schedule(parse({"lora.aggregator": aggregator}))
    assert (second.aggregator, second.primed) == (aggregator, True)
