"""Shares of noise: how large they are, and the guarantee that they give."""

import math

import numpy as np
import pytest
import torch
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given, settings
from hypothesis import strategies as st

from slora_flwr.aggregation.ring_sum import Numbers
from slora_flwr.config import ConfigError, RunConfig, Value, parse
from slora_flwr.privacy.discrete_gaussian import LEAST_STD
from slora_flwr.privacy.shares import epsilon_of, noise_multiplier, share_multiplier
from slora_flwr.wire.grid import Grid
from tests.support.runs import Config
from tests.support.secure import SHARED

WHOLE: Config = {
    **SHARED,
    "clients.count": 1000,
    "clients.per-round": 50,
    "clients.min-replies": 40,
    "rounds": 100,
    "privacy.delta": 1e-5,
}


def made(**changes: Value) -> RunConfig:
    named = {key.replace("__", ".").replace("_", "-"): v for key, v in changes.items()}
    return parse(WHOLE | named)


def test_the_fewest_that_are_left_without_colluding_ones_add_noise_enough() -> None:
    """By hand: 40 replies of 50, of which 3 (a twentieth of 50, rounded up) collude."""
    config = made(privacy__noise_multiplier=2.0)
    assert config.sharers == 37
    assert share_multiplier(config) ** 2 * 37 == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("rounds", "most", "turns"), [(100, 0, 5), (101, 0, 6), (100, 9, 9), (7, 0, 1)]
)
def test_clients_take_turns(rounds: int, most: int, turns: int) -> None:
    config = made(rounds=rounds, privacy__participations=most)
    assert config.participations == turns


@pytest.mark.parametrize("multiplier", [0.8, 1.5, 6.0])
@pytest.mark.parametrize("rounds", [20, 100])
def test_epsilon_against_the_privacy_loss_of_the_discrete_distribution(
    multiplier: float, rounds: int
) -> None:
    """dp-accounting's other accountant, in one dimension, is at most as large."""
    config = made(privacy__noise_multiplier=multiplier, rounds=rounds)
    spent = epsilon_of(config, rounds)
    step = 40  # of a sensitivity of so many
    loss = pld.from_discrete_gaussian_mechanism(multiplier * step, step)
    exact = loss.self_compose(config.participations).get_epsilon_for_delta(1e-5)
    assert exact <= spent <= 1.2 * exact
    assert epsilon_of(config, 2) <= spent


def test_noise_for_an_epsilon_spends_no_more() -> None:
    config = made(privacy__noise_multiplier=0.0, privacy__epsilon=3.0)
    known = made(privacy__noise_multiplier=noise_multiplier(config))
    assert epsilon_of(config, 100) == pytest.approx(3.0, rel=1e-3)
    assert epsilon_of(known, 100) <= 3.0


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 400),
    levels=st.sampled_from([7, 127, 2**11, 2**19]),
    seed=st.integers(0, 2**32),
    shape=st.sampled_from(["dense", "single", "halves"]),
)
def test_no_rounded_update_is_longer_than_the_sensitivity(
    count: int, levels: int, seed: int, shape: str
) -> None:
    grid = Grid(count, 0.7, levels, seed=3, is_strict=True)
    rng = np.random.default_rng(seed)
    update = rng.normal(size=count)
    if shape == "single":
        update = np.eye(count)[seed % count]
    update *= 0.7 / np.linalg.norm(update)
    if shape == "halves":  # all rotated values lie between two steps
        codes = np.ones(grid.size, np.int64)
        placed = grid.place(codes, 2, {"w": (count,)})
        update = placed["w"].double().numpy()
        update = update * min(1.0, 0.7 / float(np.linalg.norm(update)))
    state = {"w": torch.from_numpy(update.astype(np.float32))}
    array = grid.encode(state, stream=np.random.Philox(seed))
    exact = sum(int(code) ** 2 for code in grid.codes(array))
    assert exact <= grid.sensitivity**2 * (1 + 1e-9)
    # The sensitivity is not much more than the longest update either.
    steps = grid.bound / grid.step
    assert grid.sensitivity <= steps + math.sqrt(grid.size)


@pytest.mark.parametrize("count", [10, 5000, 10**6])
@pytest.mark.parametrize("multiplier", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_a_ring_holds_the_sum_and_its_noise(
    count: int, multiplier: float, dtype: str
) -> None:
    config = made(privacy__noise_multiplier=multiplier, upload__dtype=dtype)
    numbers = Numbers.of(config, "lora", count)
    assert numbers.std >= LEAST_STD
    whole = numbers.std * math.sqrt(50)
    assert numbers.grid.levels * 50 + 7 * whole <= numbers.ring.reach + 1
    assert numbers.std / numbers.grid.sensitivity == pytest.approx(multiplier / 37**0.5)


def test_noise_beyond_all_rings_is_refused() -> None:
    config = made(privacy__noise_multiplier=1e5, upload__dtype="float32")
    with pytest.raises(ConfigError, match=r"upload\.dtype is 'float32'; allowed: a"):
        Numbers.of(config, "lora", 10**6)


REFUSED: dict[str, tuple[Config, str]] = {
    "trust": ({"privacy.trust": "server"}, "privacy.trust is 'server'; allowed: sums"),
    "open": (
        {"secure.aggregation": False},
        "privacy.trust is 'sums'; allowed: server, since secure.aggregation is off",
    ),
    "none": (
        {"privacy.noise-multiplier": 0.0},
        "privacy.trust is 'sums'; allowed: server, since privacy.noise-multiplier and",
    ),
    "clip": ({"secure.clip": 1.0}, "secure.clip is 1.0; allowed: 0, since privacy"),
    "lora": ({"secure.lora-clip": 1.0}, "secure.lora-clip is 1.0; allowed: 0"),
    "few": ({"privacy.participations": 4}, "allowed: 0, or 5 to 100"),
    "many": ({"privacy.participations": 101}, "allowed: 0, or 5 to 100"),
    "colluding": (
        {"secure.colluding": 0.8},
        "clients.min-replies is 40; allowed: at least 41",
    ),
    "robust": ({"server.robust": "median"}, "server.robust is 'median'; allowed: none"),
    "resume": ({"run.resume": "/tmp/run"}, "run.resume is '/tmp/run'; allowed: empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    changes, told = REFUSED[name]
    with pytest.raises(ConfigError) as refused:
        parse(WHOLE | changes)
    assert told in str(refused.value)


def test_participations_without_shares_are_refused() -> None:
    plain = {
        k: v for k, v in WHOLE.items() if not k.startswith(("secure", "clients.m"))
    }
    changes: Config = {"privacy.trust": "server", "privacy.participations": 5}
    with pytest.raises(ConfigError, match=r"privacy\.participations is 5; allowed: 0"):
        parse(plain | changes)


def test_the_clip_of_a_phase_overrides_that_of_all() -> None:
    config = parse(
        {
            "secure.aggregation": True,
            "secure.clip": 4.0,
            "secure.lora-clip": 0.5,
            "clients.max-weight": 10,
            "clients.min-nodes": 2,
            "clients.min-replies": 2,
        }
    )
    assert config.secure_bound("sparse") == 4.0
    assert config.secure_bound("lora") == 0.5
    assert Numbers.of(config, "lora", 100).grid.bound == 0.5
