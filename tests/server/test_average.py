"""The averaged state in whole runs: what is evaluated, kept and exported."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from slora_flwr.common.tensors import State
from slora_flwr.config import ConfigError, parse
from slora_flwr.config.schedule import make_schedule
from slora_flwr.runs.checkpoint import read_checkpoint
from slora_flwr.runs.checkpoint_files import list_checkpoints
from slora_flwr.server.export import KeptState
from slora_flwr.training.trainer import Trainer
from tests.support.grids import RecordingGrid
from tests.support.runs import (
    Config,
    differ,
    elsewhere,
    events,
    facts,
    final,
    ledger,
    start,
    summary,
)

# States weigh as triangular numbers, see tests/aggregation/test_averaged_state.py.
# After one sparse round, what the low-rank phase starts from is the first of five.
SHARES = {4: np.array([1, 3, 6, 10]) / 20, 5: np.array([1, 3, 6, 10, 15]) / 35}

RUNS: dict[str, Config] = {
    "fft": {"method": "fft"},
    "sft": {"method": "sft"},
    "slora": {"method": "slora", "sparse.rounds": 1},
    "slora-exact": {"method": "slora", "sparse.rounds": 1, "lora.aggregator": "exact"},
    "lora": {"method": "lora"},
    "ffa-lora": {"method": "ffa-lora"},
    "alternate-lora": {"method": "alternate-lora"},
    "flexlora": {"method": "flexlora"},
    "fedex-lora": {"method": "fedex-lora"},
    "median": {"method": "lora", "server.robust": "median"},
    "ranks": {"method": "flexlora", "lora.ranks": "1,2,4"},
    "per-round": {"method": "sft", "sparse.schedule": "per-round"},
    "pfeiffer": {"method": "pfeiffer"},
}


def doubles(tensor: torch.Tensor) -> NDArray[np.float64]:
    return tensor.double().numpy()


def combine(tensors: list[torch.Tensor]) -> NDArray[np.float64]:
    shares = SHARES[len(tensors)]
    return np.asarray(sum(s * doubles(t) for s, t in zip(shares, tensors, strict=True)))


def products(states: list[State], name: str, rank: int) -> NDArray[np.float64]:
    """The average of dense products, cut to the rank after each round."""
    average: NDArray[np.float64] = np.zeros(())
    for number, state in enumerate(states, start=1):
        share = 3 / (number + 2)
        b, a = doubles(state[f"{name}.lora_B"]), doubles(state[f"{name}.lora_A"])
        u, s, vt = np.linalg.svd((1 - share) * average + share * (b @ a))
        average = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return average


def primed(config: Config, directory: Path) -> tuple[State, State]:
    """The start of the low-rank phase after one sparse round, and its dense base."""
    first, second = map(read_checkpoint, list_checkpoints(directory)[:2])
    sparse = first.part("phase").part("state").tensors
    start = second.part("phase").part("base").part("start")
    base = start.part("state").tensors
    scaling = start.part("positions").facts["scaling"]
    state = {n: t for n, t in sparse.items() if not n.endswith(".values")}
    weights: State = {}
    for name, module in Trainer(parse(config)).model.backbone.targets.items():
        a, b = base[f"{name}.a"], base[f"{name}.b"]
        state |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
        weight = module.weight.detach().clone()
        at = start.part("positions").tensors[name]
        weight.view(-1)[at] = sparse[f"{name}.values"]
        weights[name] = weight - scaling * (b @ a)
    return state, weights


@pytest.mark.parametrize("name", RUNS)
def test_the_average_of_a_phase_is_kept_and_evaluated(
    config: Config, name: str
) -> None:
    config |= {"run.keep": 9, "server.average": "growing", **RUNS[name]}
    rounds = 5 if "sparse.rounds" in RUNS[name] else 4
    config |= {"rounds": rounds, "train.lr": 0.01}
    directory = start(config, RecordingGrid(config))
    saved = [read_checkpoint(path) for path in list_checkpoints(directory)[-4:]]
    phases = [checkpoint.part("phase") for checkpoint in saved]
    states = [phase.part("state").tensors for phase in phases]
    bases = [phase.part("weights").tensors for phase in phases]
    if rounds == 5:
        state, base = primed(config, directory)
        states, bases = [state, *states], [base, *bases]
    found, last = final(directory, "averaged"), final(directory)
    assert differ(found, last)
    for entry, tensor in found.items():
        matrix = entry.rsplit(".", 1)[0]
        if f"{matrix}.lora_A" in found and f"{matrix}.lora_B" in found:
            rank = len(found[f"{matrix}.lora_A"])
            b, a = found[f"{matrix}.lora_B"], found[f"{matrix}.lora_A"]
            expected = products(states, matrix, rank)
            np.testing.assert_allclose(doubles(b) @ doubles(a), expected, atol=1e-6)
        elif name != "per-round" or not entry.endswith(".values"):
            expected = combine([state[entry] for state in states])
            np.testing.assert_allclose(doubles(tensor), expected, atol=1e-6)
    scaling = parse(config).lora.alpha / parse(config).lora.rank
    changes = name in ("slora-exact", "fedex-lora", "per-round")
    assert changes == bool(bases[-1])
    if changes:
        averaged = final(directory, "averaged-base")
        for matrix in bases[-1]:
            expected = combine([base[matrix] for base in bases])
            given = doubles(averaged[matrix])
            if f"{matrix}.lora_A" in found:
                # What the rank cuts off the factors' average is in the base's.
                pairs = [(s[f"{matrix}.lora_B"], s[f"{matrix}.lora_A"]) for s in states]
                expected = expected + scaling * combine([b @ a for b, a in pairs])
                b, a = found[f"{matrix}.lora_B"], found[f"{matrix}.lora_A"]
                given = given + scaling * (doubles(b) @ doubles(a))
            np.testing.assert_allclose(given, expected, atol=2e-6)

    # What was evaluated is what the files hold; stock libraries load the exports in
    # tests/adapters/test_export.py and compare their loss with the summary's.
    assert summary(directory)["loss"] == events(directory, "round")[-1]["loss"]


def test_no_average_of_an_earlier_phase_is_left(config: Config) -> None:
    """The clients cannot evaluate an averaged base, so there the last state counts."""
    config |= RUNS["slora-exact"] | {"clients.holdout": 0.2}
    assert [p.average for p in make_schedule(parse(config))] == ["ema", "none"]
    directory = start(config, RecordingGrid(config))
    assert KeptState.read(directory, "averaged").number == 3


def test_the_last_state_is_evaluated_where_asked(config: Config) -> None:
    config |= {"run.eval-plain": True, "train.lr": 0.02, "rounds": 4}
    directory = start(config, RecordingGrid(config))
    plain: Config = {"server.average": "none", "run.eval-plain": False}
    plain = elsewhere(config, **plain)
    other = start(plain, RecordingGrid(plain))
    averaged, last = events(directory, "round"), events(other, "round")
    for event, expected in zip(averaged, last, strict=True):
        for metric in ("loss", "accuracy", "macro_f1"):
            assert event[f"plain_{metric}"] == expected[metric]
    assert averaged[-1]["loss"] != last[-1]["loss"]
    # Training does not depend on the average, and it costs no bytes.
    assert not differ(final(directory), final(other))
    for row, expected_row in zip(ledger(directory), ledger(other), strict=True):
        assert row == expected_row
    assert not (other / "checkpoints" / "averaged.safetensors").exists()

    trainer = Trainer(parse(config))
    trainer.model.attach(trainer.schedule[0])
    found = trainer.evaluate_test(final(directory, "averaged"))
    assert found is not None
    assert found.loss == pytest.approx(averaged[-1]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("given", "is_same"),
    [
        ({"server.handoff": "last"}, True),
        ({"server.handoff": "last", "sparse.schedule": "per-round"}, True),
        ({"server.handoff": "last", "method": "head-lora"}, True),
        ({"server.handoff": "average"}, False),
    ],
    ids=["last", "per-round", "head-lora", "average"],
)
def test_the_last_state_is_handed_over_where_asked(
    config: Config, given: Config, is_same: bool
) -> None:
    """Training is then as if no average were kept."""
    config |= {"method": "slora", "sparse.rounds": 3, "rounds": 5, "lora.rank": 4}
    config |= {"train.lr": 0.02, **given}
    directory = start(config, RecordingGrid(config))
    plain = elsewhere(config, **{"server.average": "none"})
    other = start(plain, RecordingGrid(plain))
    assert bool(differ(final(directory), final(other))) != is_same
    # What is evaluated is an average nevertheless.
    averaged, last = events(directory, "round"), events(other, "round")
    assert averaged[-1]["loss"] != last[-1]["loss"]


@pytest.mark.parametrize("name", ["fedex-lora", "per-round", "slora-exact"])
def test_an_evaluation_leaves_the_base_alone(config: Config, name: str) -> None:
    config |= {**RUNS[name], "rounds": 4}
    often = start(config, RecordingGrid(config))
    config = elsewhere(config, **{"run.eval-every": 0})
    seldom = start(config, RecordingGrid(config))
    for state in ("last", "base", "averaged", "averaged-base"):
        assert not differ(final(often, state), final(seldom, state))


def test_the_best_state_is_the_average_with_its_base(config: Config) -> None:
    config |= {"method": "fedex-lora", "rounds": 4, "run.keep": 9}
    directory = start(config, RecordingGrid(config))
    accuracies = [event["accuracy"] for event in events(directory, "round")]
    best = accuracies.index(max(accuracies)) + 1
    assert facts(directory, "best")["round"] == str(best)
    assert facts(directory, "best")["base"] == facts(directory, "best-base")["digest"]
    saved = read_checkpoint(
        Path(directory, "checkpoints", f"round-{best:04}.safetensors")
    )
    averaged = saved.part("phase").part("averaged").part("weights").tensors
    assert not differ(final(directory, "best-base"), averaged)


def test_clients_evaluate_the_average(config: Config) -> None:
    config |= {"clients.holdout": 0.25, "rounds": 3, "train.lr": 0.02}
    directory = start(config, RecordingGrid(config))
    trainer = Trainer(parse(config))
    trainer.model.attach(trainer.schedule[0])
    found = [
        trainer.evaluate_client(client, final(directory, "averaged"))
        for client in range(6)
    ]
    losses = [(one.loss, one.examples) for one in found if one is not None]
    mean = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
    event = events(directory, "round")[-1]
    assert event["client_loss"] == pytest.approx(mean, rel=1e-6)


def test_clients_cannot_evaluate_an_averaged_base(config: Config) -> None:
    config |= {"method": "fedex-lora", "clients.holdout": 0.25}
    given = {**config, "server.average": "growing"}
    with pytest.raises(ConfigError, match=r"server\.average is 'growing'; allowed: au"):
        parse(given)
    directory = start(config, RecordingGrid(config))
    assert not (directory / "checkpoints" / "averaged.safetensors").exists()
    slora = {**config, "method": "slora", "rounds": 4, "lora.aggregator": "exact"}
    phases = make_schedule(parse(slora))
    assert [phase.average for phase in phases] == ["ema", "none"]
