"""The learning rate's course over the rounds of a phase, worked out by hand."""

import pytest

from slora_flwr.config import ConfigError, Value, parse
from slora_flwr.config.schedule import make_schedule

TEN: dict[str, Value] = {"method": "lora", "rounds": 10, "train.lr": 0.5}
ROOT = 0.5**0.5


@pytest.mark.parametrize(
    ("changes", "shares"),
    [
        ({}, {1: 1, 5: 1, 10: 1}),
        ({"train.schedule": "linear"}, {1: 1, 2: 0.9, 6: 0.5, 10: 0.1}),
        # cos(0), cos(pi/4) after a quarter of 8 rounds, cos(pi/2) after half of them.
        (
            {"train.schedule": "cosine", "rounds": 8},
            {1: 1, 3: (1 + ROOT) / 2, 5: 0.5, 7: (1 - ROOT) / 2},
        ),
        ({"train.warmup-rounds": 4}, {1: 0.25, 2: 0.5, 3: 0.75, 4: 1, 5: 1, 10: 1}),
        (
            {"train.warmup-rounds": 2, "train.schedule": "linear"},
            {1: 0.5, 2: 1, 3: 1, 4: 7 / 8, 10: 1 / 8},
        ),
    ],
)
def test_a_rounds_rate(changes: dict[str, Value], shares: dict[int, float]) -> None:
    [phase] = make_schedule(parse(TEN | changes))
    found = {number: phase.at(number).recipe.lr for number in shares}
    assert found == pytest.approx({n: 0.5 * share for n, share in shares.items()})


def test_the_heads_rate_takes_the_same_course() -> None:
    values = TEN | {"train.schedule": "linear", "train.head-lr": 0.25}
    [phase] = make_schedule(parse(values))
    assert phase.at(1).recipe.head_lr == 0.25
    assert phase.at(6).recipe.head_lr == pytest.approx(0.125)


def test_each_phase_has_its_own_course() -> None:
    values: dict[str, Value] = {"method": "slora", "rounds": 10, "sparse.rounds": 4}
    sparse, lora = make_schedule(parse({**values, "train.schedule": "linear"}))
    shares = [sparse.at(n).recipe.lr / sparse.recipe.lr for n in (1, 4)]
    assert shares == pytest.approx([1, 1 / 4])
    shares = [lora.at(n).recipe.lr / lora.recipe.lr for n in (1, 6)]
    assert shares == pytest.approx([1, 1 / 6])


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        (
            {"method": "slora", "sparse.rounds": 3, "train.warmup-rounds": 3},
            "train.warmup-rounds is 3; allowed: 0 to 2, fewer than the rounds of the "
            "shortest phase",
        ),
        (
            {"method": "slora", "sparse.rounds": 0, "train.schedule": "cosine"},
            "train.schedule is 'cosine'; allowed: constant, since sparse.rounds is 0: "
            "no phase has a set length",
        ),
        (
            {"method": "slora", "sparse.rounds": 0, "train.warmup-rounds": 1},
            "train.warmup-rounds is 1; allowed: 0, since sparse.rounds is 0: no phase "
            "has a set length",
        ),
    ],
)
def test_a_course_must_fit_the_phases(changes: dict[str, Value], refusal: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(TEN | changes)
    assert str(caught.value) == refusal
