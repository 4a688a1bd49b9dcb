"""A client's noise and budget, by its number of examples."""

import pytest

from slora_flwr.config import ConfigError, RunConfig, parse
from slora_flwr.privacy.accountant import Release, epsilon
from slora_flwr.privacy.examples import BudgetError, ExamplePrivacy
from slora_flwr.server.privacy import ExampleLedger
from tests.support.runs import Config

EXAMPLES: Config = {
    "method": "lora",
    "rounds": 6,
    "clients.count": 3,
    "clients.per-round": 3,
    "privacy.unit": "example",
    "privacy.clip-norm": 1.0,
    "privacy.epsilon": 4.0,
}
TWO_PHASES: Config = {
    "method": "slora",
    "sparse.rounds": 2,
    "sparse.batch-size": 50,
    "sparse.epochs": 2,
}


def make(changes: Config | None = None) -> RunConfig:
    return parse(EXAMPLES | (changes or {}))


def test_a_training_s_steps_and_rate() -> None:
    """200 examples in batches of 16: 13 steps of a rate of 0.08."""
    found = ExamplePrivacy(make(), 200)
    noise = found.noise_multiplier
    assert found.delta == 200**-1.1
    assert found.release(0) == Release(0.08, noise, 13)
    assert ExamplePrivacy(make({"train.steps": 4}), 200).release(0).steps == 4
    few = ExamplePrivacy(make({"privacy.delta": 0.01}), 12)
    assert few.release(0) == Release(1.0, few.noise_multiplier, 1)


@pytest.mark.parametrize("changes", [{}, TWO_PHASES])
def test_the_noise_is_for_all_rounds(changes: Config) -> None:
    config = parse(EXAMPLES | changes)
    found = ExamplePrivacy(config, 200)
    rounds = {0: 2, 1: 4} if changes else {0: 6}
    assert 3.99 < found.epsilon(rounds) <= 4.0
    if changes:
        kinds = [found.release(0, 2), found.release(1, 4)]
        assert [(r.rate, r.steps) for r in kinds] == [(0.25, 16), (0.08, 52)]
        assert found.epsilon(rounds) == epsilon(kinds, found.delta)


def test_an_open_phase_may_end_whenever() -> None:
    config = parse(EXAMPLES | {"method": "slora", "sparse.rounds": 0})
    found = ExamplePrivacy(config, 200)
    for first in range(1, 6):
        assert found.epsilon({0: first, 1: 6 - first}) <= 4.0


def test_no_training_beyond_the_budget() -> None:
    privacy = ExamplePrivacy(make(), 200)
    done: tuple[Release, ...] = ()
    for _ in range(6):
        done = privacy.spend(done, 0)
    assert done == (privacy.release(0, 6),)
    with pytest.raises(BudgetError, match="it has spent its epsilon of 4: another "):
        privacy.spend(done, 0)
    # Of another phase neither, and a smaller budget in the past counts too.
    with pytest.raises(BudgetError):
        privacy.spend([Release(0.5, 0.5, 30)], 0)


def test_without_an_epsilon_there_is_no_budget() -> None:
    config = make({"privacy.epsilon": 0.0, "privacy.noise-multiplier": 0.7})
    privacy = ExamplePrivacy(config, 200)
    done: tuple[Release, ...] = ()
    for _ in range(30):
        done = privacy.spend(done, 0)
    assert done == (Release(0.08, 0.7, 13 * 30),)


@pytest.mark.parametrize(
    ("count", "delta", "is_allowed"),
    [
        (66, 0.0, True),
        (65, 0.0, False),
        (0, 0.0, False),
        (200, 0.004, True),
        (200, 0.005, False),
        (12, 0.01, True),
    ],
)
def test_delta_is_below_one_over_the_examples(
    count: int, delta: float, is_allowed: bool
) -> None:
    config = make({"privacy.delta": delta})
    if is_allowed:
        assert ExamplePrivacy(config, count).delta == (delta or count**-1.1)
        return
    with pytest.raises(BudgetError, match=f"for its {count} examples; allowed: up to"):
        ExamplePrivacy(config, count)


def test_the_server_tells_the_most_that_a_client_has_spent() -> None:
    """Fewer examples mean a larger rate: with the same noise, more is spent."""
    config = make({"privacy.epsilon": 0.0, "privacy.noise-multiplier": 0.7})
    ledger, sizes = ExampleLedger(config), {0: 1000, 1: 100, 2: 10}
    assert ledger.facts(sizes)["epsilon"] == 0.0
    ledger.note(0, [0, 1, 2])
    ledger.note(0, [0, 1])
    found = ledger.facts(sizes)
    expected = ExamplePrivacy(config, 100).epsilon({0: 2})
    # The third is refused for its delta, and does not train.
    assert found == {
        "unit": "example",
        "epsilon": expected,
        "delta": 100**-1.1,
        "noise_multiplier": 0.7,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"privacy.clip-norm": 0.0}, "privacy.clip-norm is 0.0; allowed: a number abo"),
        ({"privacy.delta": 0.02}, "privacy.delta is 0.02; allowed: up to 0.01"),
        ({"clients.holdout": 0.1}, "clients.holdout is 0.1; allowed: 0, since privacy"),
        ({"clients.weight": "tokens"}, "clients.weight is 'tokens'; allowed: examples"),
        ({"train.clip-norm": 1.0}, "train.clip-norm is 1.0; allowed: 0, since privacy"),
        ({"lora.ranks": "1,2"}, "lora.ranks is '1,2'; allowed: empty, since privacy"),
        ({"run.resume": "/runs/a"}, "run.resume is '/runs/a'; allowed: empty, since"),
        (
            {"data.name": "node", "clients.count": 0, "data.labels": "a,b"},
            "data.test is ''; allowed: a file on the server, since privacy.unit is ",
        ),
        (
            {"method": "slora", "sparse.rounds": 0, "sparse.epochs": 2},
            "sparse.rounds is 0; allowed: at least 1, since privacy.unit is example",
        ),
    ],
)
def test_what_has_no_guarantee_is_refused(changes: Config, message: str) -> None:
    parse(EXAMPLES)
    with pytest.raises(ConfigError) as caught:
        parse(EXAMPLES | changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "changes",
    [
        {"server.robust": "median"},
        {"server.clip-norm": 1.0},
        {"method": "fedex-lora"},
        {"lora.aggregator": "flexlora"},
        {"server.optimizer": "fedadam"},
        {"clients.count": 1, "clients.per-round": 1},
    ],
)
def test_what_the_server_computes_is_free(changes: Config) -> None:
    parse(EXAMPLES | changes)


REFUSED: dict[str, tuple[Config, str]] = {
    "no noise": (
        {"privacy.noise-multiplier": 0.0, "privacy.epsilon": 0.0},
        "privacy.unit is 'example'; allowed: client, since privacy.noise-multiplier",
    ),
    "8bit": ({"model.quantize": "8bit"}, "model.quantize is '8bit'; allowed: empty or"),
    "autocast": ({"train.precision": "bf16"}, "train.precision is 'bf16'; allowed: au"),
    "bf16": (
        {"model.dtype": "bfloat16"},
        "model.dtype is 'bfloat16'; allowed: float32",
    ),
    "trust": (
        {
            "privacy.trust": "sums",
            "secure.aggregation": True,
            "secure.clip": 1.0,
            "clients.min-nodes": 2,
            "clients.min-replies": 2,
            "clients.max-weight": 10,
        },
        "privacy.trust is 'sums'; allowed: server, since privacy.unit is example",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """What does not keep examples apart, or would be private in name alone."""
    changes, told = REFUSED[name]
    keys: Config = {
        "privacy.unit": "example",
        "privacy.noise-multiplier": 1.0,
        "privacy.clip-norm": 1.0,
    }
    with pytest.raises(ConfigError) as refused:
        parse(keys | changes)
    assert told in str(refused.value)
