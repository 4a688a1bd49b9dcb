"""Noise that cannot be accounted, or hides too little, is refused; the rest holds."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_ndtr

from slora_flwr.aggregation.clipped import ClippedMean
from slora_flwr.config import ConfigError, parse
from slora_flwr.server.privacy import Privacy
from tests.support.runs import Config

LEAST, MOST = 1e-3, 1e6
PRIVATE: Config = {
    "privacy.clip-norm": 1e-2,
    "privacy.noise-multiplier": 1.0,
    "clients.count": 1000,
    "clients.per-round": 50,
}


@pytest.mark.parametrize(
    "noise",
    [5e-324, 1e-170, 1e-160, 1e-154, 9.9e-4, 1.1e6, 1e154, 1e155, math.inf, math.nan],
)
def test_noise_that_cannot_be_accounted_is_refused(noise: float) -> None:
    """dp-accounting's epsilon for 1e-160 is 0.0, and it fails for 1e-170 and 1e155."""
    with pytest.raises(ConfigError) as caught:
        parse(PRIVATE | {"privacy.noise-multiplier": noise})
    allowed = "allowed: a number from 0.001 up to 1000000, or 0"
    assert str(caught.value) == f"privacy.noise-multiplier is {noise!r}; {allowed}"


def log_delta(epsilon: float, noise: float, rate: float) -> float:
    """The exact delta of one release if a client is added, as a logarithm.

    The densities are (1 - q) N(0, s^2) + q N(1, s^2) and N(0, s^2). Their ratio exceeds
    exp(epsilon) beyond s^2 t + 1/2, where t is the log of (exp(epsilon) - 1 + q) / q.
    """
    log_rate, t = math.log(rate), 0.0
    if epsilon:
        above = epsilon + math.log(-math.expm1(-epsilon))
        t = float(np.logaddexp(above, log_rate)) - log_rate
    more = log_ndtr(-(noise * t - 0.5 / noise))
    less = log_ndtr(-(noise * t + 0.5 / noise))
    share = -math.expm1(t + less - more)
    # Where float64 cannot tell the tails apart, one of them bounds their difference.
    return float(log_rate + more + (math.log(share) if share > 0 else 0.0))


def test_the_exact_delta_of_known_examples() -> None:
    """At epsilon 0 it is 2 Phi(1 / 2s) - 1, and q times that if sampled."""
    apart = math.erf(0.5 / math.sqrt(2))
    assert log_delta(0.0, 1.0, 1.0) == pytest.approx(math.log(apart))
    assert log_delta(0.0, 1.0, 0.25) == pytest.approx(math.log(apart / 4))
    # Phi(1/2 - 1) - e Phi(-1/2 - 1)
    exact = 0.3085375 - math.e * 0.0668072
    assert log_delta(1.0, 1.0, 1.0) == pytest.approx(math.log(exact), abs=1e-5)


@pytest.mark.parametrize("delta", [5e-324, 1e-300, 1e-20, 1e-6, 9e-4])
@pytest.mark.parametrize("noise", [LEAST, 0.03, 1.0, 40.0, 1e4, MOST])
@pytest.mark.parametrize(
    ("count", "per_round", "rounds"),
    [
        (1000, 1000, 1),
        (1000, 1000, 50),
        (1000, 1000, 10**6),
        (1000, 20, 1),
        (10**7, 1, 1),
    ],
)
def test_the_epsilon_told_is_no_less_than_the_exact_one(
    count: int, per_round: int, rounds: int, noise: float, delta: float
) -> None:
    """Rounds of all clients are as one with the noise over their number's root."""
    delta = min(delta, 0.9 / count)
    keys: Config = {
        "clients.count": count,
        "clients.per-round": per_round,
        "privacy.noise-multiplier": noise,
        "privacy.delta": delta,
    }
    told = Privacy(parse(PRIVATE | keys)).epsilon(rounds)
    exact = log_delta(told, noise / math.sqrt(rounds), per_round / count)
    assert exact <= math.log(delta) + 1e-9


def last_bits(bound: float) -> list[int]:
    """Return how often noise at a bound ends with each two bits."""
    fold = ClippedMean(bound, expected=1)
    fold.perturb(1.0, {"x": (4000,)}, np.random.default_rng(0))
    return torch.bincount(fold.sums["x"] & 3, minlength=4).tolist()


def test_noise_too_coarse_to_hide_the_last_bits_is_refused() -> None:
    """At 2^15 the last two bits are anyone's guess; at 2^26 most noise has none."""
    assert all(900 < times < 1100 for times in last_bits(2.0**15))
    assert last_bits(2.0**26)[0] > 3500
    Privacy(parse(PRIVATE | {"privacy.clip-norm": 2.0**15}))
    for keys in (
        {"privacy.clip-norm": 32769.0},
        {"privacy.lora-clip-norm": 32769.0},
        {"privacy.clip-norm": 1.0, "privacy.noise-multiplier": 32769.0},
    ):
        with pytest.raises(ConfigError, match=r"^privacy.clip-norm is .* too coarse"):
            Privacy(parse(PRIVATE | keys))


def test_an_epsilon_that_takes_coarse_noise_is_refused() -> None:
    keys: Config = {"privacy.noise-multiplier": 0.0, "privacy.epsilon": 1e-9}
    most = 32768 / Privacy(parse(PRIVATE | keys)).noise_multiplier
    with pytest.raises(
        ConfigError, match=rf"^privacy.clip-norm is .* up to {most:.4g} "
    ):
        Privacy(parse(PRIVATE | keys | {"privacy.clip-norm": most * 1.001}))
