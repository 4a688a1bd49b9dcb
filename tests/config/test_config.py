"""The run config: keys, types, limits, cross-checks, and the schedule it gives."""

import json
import math
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.common.config import parse_config_args
from hypothesis import assume, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from slora_flwr.cli import app
from slora_flwr.config import (
    ConfigError,
    RunConfig,
    Value,
    flatten,
    list_keys,
    methods,
    parse,
)
from slora_flwr.config.methods import (
    ADAPTERS,
    find_adapter,
    find_aggregator,
    section_of,
)
from slora_flwr.config.schedule import make_schedule

DEFAULTS = flatten(RunConfig())

# For every key another value that is fine, all of them together too.
CHANGED: dict[str, Value] = {
    "method": "lora",
    "task": "causal-lm",
    "rounds": 7,
    "seed": 2**63 - 1,
    "track": "wandb, tensorboard",
    "model.name": "some/model",
    "model.revision": "v2",
    "model.dtype": "bfloat16",
    "model.quantize": "8bit",
    "data.name": "20newsgroups",
    "data.train": "/a.csv",
    "data.test": "/b.csv",
    "data.text": "title,body",
    "data.label": "topic",
    "data.response": "answer",
    "data.messages": "chat",
    "data.template": "alpaca",
    "data.labels": "",
    "data.max-length": 4,
    "data.validation": 0.25,
    "data.max-test": 9,
    "clients.count": 0,
    "clients.per-round": 11,
    "clients.partitioner": "virtual",
    "clients.by": "author",
    "clients.alpha": 0.5,
    "clients.classes": 3,
    "clients.examples": 50,
    "clients.min-examples": 2,
    "clients.weight": "tokens",
    "clients.max-weight": 500,
    "clients.min-nodes": 2,
    "clients.min-replies": 11,
    "clients.deadline": 0.5,
    "clients.holdout": 0.1,
    "train.epochs": 2,
    "train.batch-size": 8,
    "train.steps": 9,
    "train.accumulate": 2,
    "train.tokens": 512,
    "train.checkpointing": True,
    "train.optimizer": "sgd",
    "train.lr": 0.1,
    "train.head-lr": 0.5,
    "train.schedule": "cosine",
    "train.warmup-rounds": 2,
    "train.weight-decay": 0.01,
    "train.momentum": 0.9,
    "train.prox": 0.001,
    "train.clip-norm": 1.0,
    "train.precision": "bf16",
    "sparse.epochs": 3,
    "sparse.batch-size": 4,
    "sparse.optimizer": "adamw",
    "sparse.lr": 0.2,
    "sparse.head-lr": 0.6,
    "sparse.density": 1.0,
    "sparse.rounds": 2,
    "sparse.mask": "rows",
    "sparse.schedule": "per-round",
    "sparse.budget": "equal",
    "lora.epochs": 4,
    "bottleneck.epochs": 4,
    "lora.batch-size": 32,
    "bottleneck.batch-size": 32,
    "lora.optimizer": "sgd",
    "bottleneck.optimizer": "sgd",
    "lora.lr": 0.3,
    "bottleneck.lr": 0.3,
    "lora.head-lr": 0.7,
    "bottleneck.head-lr": 0.7,
    "lora.rank": 4,
    "lora.ranks": "1, 4",
    "lora.scaling": "root-rank",
    "lora.start": "orthonormal",
    "bottleneck.reduction": 1,
    "lora.alpha": 1.0,
    "lora.targets": "query, value",
    "lora.aggregator": "flexlora",
    "lora.base": "warm-start",
    "lora.factors": "b",
    "server.optimizer": "none",
    "server.lr": 0.0,
    "server.average": "growing",
    "server.average-decay": 0.5,
    "server.handoff": "last",
    "server.clip-norm": 2.0,
    "server.robust": "none",
    "server.byzantine": 0,
    "attack.kind": "label-flip",
    "attack.share": 0.1,
    "attack.scale": 0.0,
    "upload.dtype": "int4",
    "upload.top-k": 0.1,
    "upload.importance": "product",
    "upload.feedback": False,
    "upload.lossless": True,
    "download.dtype": "float32",
    "download.base-dtype": "float16",
    "download.lossless": False,
    "privacy.unit": "client",
    "privacy.noise-multiplier": 0.0,
    "privacy.epsilon": 0.0,
    "privacy.delta": 1e-6,
    "privacy.clip-norm": 0.5,
    "privacy.sparse-clip-norm": 0.25,
    "privacy.lora-clip-norm": 0.75,
    "privacy.trust": "server",
    "privacy.participations": 0,
    "secure.aggregation": False,
    "secure.clip": 2.0,
    "secure.sparse-clip": 3.0,
    "secure.lora-clip": 1.0,
    "secure.threshold": 0.75,
    "secure.colluding": 0.1,
    "run.dir": "/out",
    "run.resume": "/out",
    "run.keep": 1,
    "run.eval-every": 0,
    "run.eval-plain": True,
    "run.generate": 20,
    "run.max-tokens": 9,
    "run.choices": "/srv/questions.jsonl",
    "run.target": 1.0,
    "run.metrics-port": 9464,
}
# What flexlora and lora.ranks leave no choice of, privacy among it, and data.labels,
# which is for data.name "node".
KEPT = {
    "server.optimizer",
    "server.lr",
    "server.robust",
    "server.byzantine",
    "download.dtype",
    "download.lossless",
    "data.labels",
    "privacy.noise-multiplier",
    "privacy.epsilon",
    "privacy.unit",
    "privacy.trust",
    "privacy.participations",
    "secure.aggregation",
}
OWN: dict[str, Value] = {
    "data.name": "node",
    "clients.count": 0,
    "clients.holdout": 0.2,
}

OPTIMIZERS = "adamw, sgd"
# Key, a value of the right type that cannot be, and what its message says is allowed:
# every one of the phrases.
BAD: list[tuple[str, Value, str]] = [
    ("method", "fedavg", "slora, sft, lora, fft, bitfit, houlsby, pfeiffer, head"),
    ("method", "fedex", "ffa-lora, alternate-lora, fedex-lora, flexlora, head-lora"),
    ("task", "regression", "classification, causal-lm"),
    ("rounds", 0, "a number from 1 up to 1000000"),
    ("seed", -1, "a whole number from 0 to 2^63 - 1"),
    ("seed", 2**63, "a whole number from 0 to 2^63 - 1"),
    ("model.name", "", "embedded, a folder or a Hub id"),
    ("model.revision", "../v2", "a branch, a tag or a commit, or empty"),
    ("model.dtype", "float16", "float32, bfloat16"),
    ("model.quantize", "2bit", "empty, 8bit, 4bit"),
    ("data.name", "", "a data set's name or a path"),
    ("data.template", "vicuna", "auto, chat, alpaca, plain"),
    ("data.labels", "a,b", "empty, or data.name node, or privacy"),
    ("data.max-length", 3, "a number from 4 up to 131072"),
    ("data.validation", 1.0, "a number from 0 below 1"),
    ("data.validation", -0.1, "a number from 0 below 1"),
    ("data.max-test", -1, "a number of at least 0"),
    ("clients.count", -1, "a number from 0 up to 10000000"),
    ("clients.per-round", 0, "a number of at least 1"),
    ("clients.per-round", 21, "1 to clients.count, which is 20"),
    ("clients.partitioner", "zipf", "iid, dirichlet, pathological, virtual"),
    ("clients.alpha", 0.0, "a number above 0"),
    ("clients.classes", 0, "a number of at least 1"),
    ("clients.examples", 0, "a number of at least 1"),
    ("clients.min-examples", 0, "a number of at least 1"),
    ("clients.weight", "bytes", "examples, tokens"),
    ("clients.max-weight", -1, "a number of at least 0"),
    ("clients.min-nodes", 0, "a number of at least 1"),
    ("clients.min-replies", 0, "1 to clients.per-round, which is 5"),
    ("clients.min-replies", 6, "1 to clients.per-round, which is 5"),
    ("clients.deadline", 0.0, "a number above 0"),
    ("clients.holdout", 1.0, "a number from 0 below 1"),
    ("train.epochs", 0, "a number from 1 up to 1000"),
    ("train.batch-size", 0, "a number from 1 up to 4096"),
    ("train.optimizer", "", OPTIMIZERS),
    ("train.steps", -1, "a number of at least 0"),
    ("train.accumulate", 0, "a number from 1 up to 4096"),
    ("train.tokens", -1, "a number of at least 0"),
    ("train.lr", -0.1, "a number of at least 0"),
    ("train.head-lr", -0.1, "a number of at least 0"),
    ("train.schedule", "step", "constant, cosine, linear"),
    ("train.warmup-rounds", -1, "a number of at least 0"),
    ("train.weight-decay", -0.1, "a number of at least 0"),
    ("train.momentum", -0.1, "a number from 0 below 1"),
    ("train.prox", -0.1, "a number of at least 0"),
    ("train.clip-norm", -0.1, "a number of at least 0"),
    ("train.precision", "fp16", "float32, bf16"),
    ("sparse.epochs", -1, "a number from 0 up to 1000"),
    ("sparse.batch-size", -1, "a number from 0 up to 4096"),
    ("sparse.optimizer", "adam", OPTIMIZERS),
    ("sparse.lr", -0.1, "a number of at least 0"),
    ("sparse.head-lr", -0.1, "a number of at least 0"),
    ("sparse.density", 0.0, "a number above 0 up to 1"),
    ("sparse.density", 1.5, "a number above 0 up to 1"),
    ("sparse.rounds", -2, "a number of at least 0, or -1"),
    ("sparse.rounds", 12, "up to 11 for slora, since rounds is 12"),
    ("sparse.mask", "diagonal", "unstructured, rows, columns"),
    ("sparse.schedule", "never", "fixed, per-round"),
    ("sparse.budget", "global", "uniform, erdos-renyi, equal"),
    ("lora.epochs", -1, "a number from 0 up to 1000"),
    ("bottleneck.epochs", -1, "a number from 0 up to 1000"),
    ("lora.batch-size", -1, "a number from 0 up to 4096"),
    ("bottleneck.batch-size", -1, "a number from 0 up to 4096"),
    ("lora.optimizer", "adam", OPTIMIZERS),
    ("bottleneck.optimizer", "adam", OPTIMIZERS),
    ("lora.lr", -0.1, "a number of at least 0"),
    ("lora.head-lr", -0.1, "a number of at least 0"),
    ("bottleneck.lr", -0.1, "a number of at least 0"),
    ("bottleneck.head-lr", -0.1, "a number of at least 0"),
    ("lora.rank", 0, "a number of at least 1"),
    ("bottleneck.reduction", 0, "a number of at least 1"),
    ("lora.alpha", 0.0, "a number above 0"),
    ("lora.targets", "", "all-linear, or module names"),
    ("lora.targets", "query,,value", "all-linear, or module names"),
    ("lora.ranks", "2,9", "empty, or whole numbers from 1 to lora.rank, which is 8"),
    ("lora.ranks", "0", "empty, or whole numbers from 1 to lora.rank, which is 8"),
    ("lora.ranks", "2,,4", "empty, or whole numbers from 1 to lora.rank, which is 8"),
    ("lora.scaling", "none", "rank, root-rank"),
    ("lora.start", "pissa", "peft, orthonormal, federa"),
    ("lora.aggregator", "median", "fedavg, ffa, alternate, exact, flexlora"),
    ("lora.base", "w1", "residual, w0, warm-start"),
    ("lora.factors", "a", "auto, balanced, b"),
    ("server.optimizer", "adam", "none, fedavgm, fedadam"),
    ("server.lr", -1.0, "a number of at least 0"),
    ("server.average", "mean", "auto, none, ema, growing"),
    ("server.average-decay", 1.0, "a number from 0 below 1"),
    ("server.handoff", "best", "average, last"),
    ("server.clip-norm", -0.1, "a number of at least 0"),
    ("server.robust", "bulyan", "none, median, trimmed-mean, krum, multi-krum"),
    ("server.byzantine", -1, "a number of at least 0"),
    ("server.byzantine", 1, "0, since server.robust is none"),
    ("attack.kind", "backdoor", "none, label-flip, scaled-update"),
    ("attack.share", 0.0, "a number above 0 up to 1"),
    ("attack.share", 1.5, "a number above 0 up to 1"),
    ("attack.scale", 1.0, "a number other than 1"),
    ("upload.dtype", "int2", "float32, float16, bfloat16, int8, int4"),
    ("upload.top-k", 1.5, "a number from 0 up to 1"),
    ("upload.top-k", -0.1, "a number from 0 up to 1"),
    ("upload.importance", "random", "magnitude, product"),
    ("download.dtype", "int4", "float32, float16, bfloat16, int8"),
    ("download.base-dtype", "int4", "float32, float16, bfloat16, int8"),
    ("privacy.unit", "clients", "client, example"),
    ("privacy.noise-multiplier", -1.0, "a number from 0.001 up to 1000000, or 0"),
    ("privacy.epsilon", -1.0, "a number of at least 0"),
    ("privacy.delta", -1e-5, "a number of at least 0"),
    ("privacy.delta", 1.0, "a number from 0 below 1"),
    ("privacy.clip-norm", -1.0, "a number of at least 0"),
    ("privacy.sparse-clip-norm", -1.0, "a number of at least 0"),
    ("privacy.lora-clip-norm", -1.0, "a number of at least 0"),
    ("privacy.trust", "nobody", "server"),
    ("privacy.trust", "nobody", "sums"),
    ("privacy.participations", -1, "a number of at least 0"),
    ("secure.aggregation", "yes", "true or false"),
    ("secure.clip", -1.0, "a number of at least 0"),
    ("secure.sparse-clip", -1.0, "a number of at least 0"),
    ("secure.lora-clip", -1.0, "a number of at least 0"),
    ("secure.threshold", 0.49, "a number from 0.5 below 1"),
    ("secure.threshold", 1.0, "a number from 0.5 below 1"),
    ("secure.colluding", 1.0, "a number from 0 below 1"),
    ("run.dir", "out", "an absolute path, or empty"),
    ("run.resume", "out", "an absolute path, or empty"),
    ("run.keep", 0, "a number of at least 1"),
    ("run.eval-every", -1, "a number of at least 0"),
    ("run.eval-plain", "no", "true or false"),
    ("run.generate", -1, "a number of at least 0"),
    ("run.max-tokens", 0, "a number from 1 up to 4096"),
    ("run.choices", "questions.jsonl", "an absolute path, or empty"),
    ("run.target", -0.1, "a number of at least 0"),
    ("run.metrics-port", 65536, "a number from 0 up to 65535"),
    ("track", "comet", "tensorboard, wandb, trackio, mlflow"),
    ("track", "wandb,wandb", "each once"),
    ("track", "wandb,", "or empty"),
]
# Any string will do here; what they name is looked up later.
FREE = {"data.train", "data.test", "data.text", "data.label", "clients.by"}
FREE |= {"data.response", "data.messages"}
# Both values will do.
FREE |= {
    "train.checkpointing",
    "upload.feedback",
    "upload.lossless",
    "download.lossless",
}

WRONG_TYPES: dict[type, tuple[list[Value], str]] = {
    bool: ([1, 0.0, "true"], "true or false"),
    int: ([True, 1.0, "1"], "a whole number"),
    float: ([True, "1.0"], "a number"),
    str: ([1, 0.5, False], "a string"),
}


def refusal(values: dict[str, Value]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(values)
    return str(caught.value)


def test_pyproject_holds_every_default() -> None:
    path = Path(__file__).parents[2] / "pyproject.toml"
    table = tomllib.loads(path.read_text())["tool"]["flwr"]["app"]["config"]
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    stated = {key.name: key.default for key in list_keys()}
    # Whole numbers equal floats, but Flower holds a key to its default's type.
    assert [(k, type(v), v) for k, v in flat.items()] == [
        (k, type(v), v) for k, v in stated.items()
    ]


def test_no_keys_mean_the_defaults() -> None:
    assert parse({}) == RunConfig()
    assert parse(DEFAULTS) == RunConfig()


def test_every_key_can_be_changed_and_comes_back() -> None:
    assert CHANGED.keys() == DEFAULTS.keys()
    same = {key for key, value in CHANGED.items() if value == DEFAULTS[key]}
    assert same == KEPT
    config = parse(CHANGED)
    assert flatten(config) == CHANGED
    assert parse(flatten(config)) == config


def test_keys_land_in_their_sections() -> None:
    config = parse(CHANGED)
    assert (config.method, config.rounds) == ("lora", 7)
    assert config.clients.per_round == 11
    assert config.clients.min_replies == 11
    assert config.data.max_length == 4
    assert (config.train.epochs, config.sparse.epochs, config.lora.epochs) == (2, 3, 4)
    assert (config.train.lr, config.sparse.lr, config.lora.lr) == (0.1, 0.2, 0.3)
    assert config.run.eval_every == 0


def test_whole_numbers_are_numbers() -> None:
    found = parse({"clients.alpha": 1}).clients.alpha
    assert (found, type(found)) == (1.0, float)


def test_the_bad_values_cover_every_key() -> None:
    assert {key for key, _, _ in BAD} | FREE == DEFAULTS.keys()


@pytest.mark.parametrize(
    ("key", "value", "allowed"), BAD, ids=[f"{k}={v}" for k, v, _ in BAD]
)
def test_a_bad_value_is_named_with_what_is_allowed(
    key: str, value: Value, allowed: str
) -> None:
    start, _, end = refusal({key: value}).partition("; allowed: ")
    assert start == f"{key} is {value!r}"
    assert set(allowed.split(", ")) <= set(end.split(", "))


@pytest.mark.parametrize(
    ("key", "value"),
    [(k, v) for k, d in DEFAULTS.items() for v in WRONG_TYPES[type(d)][0]],
)
def test_a_wrong_type_is_named(key: str, value: Value) -> None:
    wanted = WRONG_TYPES[type(DEFAULTS[key])][1]
    assert refusal({key: value}) == f"{key} is {value!r}; allowed: {wanted}"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", [k for k, v in DEFAULTS.items() if type(v) is float])
def test_numbers_are_finite(key: str, value: float) -> None:
    assert refusal({key: value}).startswith(f"{key} is {value!r}; allowed: a number ")


@pytest.mark.parametrize(
    ("unknown", "near"),
    [
        ("clients.per_round", "clients.per-round"),
        ("lora.rnak", "lora.rank"),
        ("round", "rounds"),
        ("train.batchsize", "train.batch-size"),
        # What phases only override is meant for all of them.
        ("epochs", "train.epochs"),
        ("epoch", "train.epochs"),
        ("lr", "train.lr"),
        ("batchsize", "train.batch-size"),
        ("optimizer", "train.optimizer"),
        ("training.epochs", "train.epochs"),
        ("momentum", "train.momentum"),
        ("rank", "lora.rank"),
        ("density", "sparse.density"),
        ("partition", "clients.partitioner"),
        ("dirichlet.alpha", "clients.alpha or lora.alpha"),
        ("dtype", "model.dtype or upload.dtype or download.dtype"),
        ("name", "model.name or data.name"),
        ("sed", "seed"),
    ],
)
def test_an_unknown_key_suggests_the_near_one(unknown: str, near: str) -> None:
    expected = f"{unknown} is not a run config key; did you mean {near}?"
    assert refusal({unknown: 1}) == expected


def test_a_key_like_no_other_lists_those_there_are() -> None:
    message = refusal({"xyzzy": 1})
    assert message.startswith("xyzzy is not a run config key; known: method, task, ")
    assert all(key in message for key in DEFAULTS)


def test_sparse_rounds_leave_one_for_lora() -> None:
    parse({"rounds": 5, "sparse.rounds": 4})
    message = refusal({"rounds": 4, "sparse.rounds": 4})
    assert message == (
        "sparse.rounds is 4; allowed: up to 3 for slora, since rounds is 4"
    )


@pytest.mark.parametrize("method", ["slora", "head-lora"])
@pytest.mark.parametrize(
    ("rounds", "first"), [(2, 1), (3, 1), (5, 1), (6, 2), (12, 4), (50, 16)]
)
def test_the_first_phase_has_a_third_of_the_rounds_unless_told(
    method: str, rounds: int, first: int
) -> None:
    for values in ({}, {"sparse.rounds": -1}):
        config = parse({"method": method, "rounds": rounds, **values})
        assert [p.rounds for p in make_schedule(config)] == [first, rounds - first]
        assert flatten(config)["sparse.rounds"] == first
    # A number that a config was given, or was written with, stays.
    config = parse(flatten(config) | {"rounds": rounds + 30})
    assert make_schedule(config)[0].rounds == first


@pytest.mark.parametrize("method", ["sft", "lora", "fft", "head"])
def test_only_slora_splits_its_rounds(method: str) -> None:
    assert parse({"method": method, "rounds": 1, "sparse.rounds": 9}).rounds == 1


def test_a_cohort_fits_the_population() -> None:
    parse({"clients.count": 3, "clients.per-round": 3})
    message = refusal({"clients.count": 3, "clients.per-round": 4})
    assert message == "clients.per-round is 4; allowed: 1 to clients.count, which is 3"


def test_one_client_per_node_leaves_the_cohort_open() -> None:
    config = parse({"clients.count": 0, "clients.per-round": 1000})
    assert config.clients.per_round == 1000


def test_as_many_replies_can_be_asked_for_as_clients() -> None:
    parse({"clients.per-round": 2, "clients.min-replies": 2})
    message = refusal({"clients.per-round": 2, "clients.min-replies": 3})
    expected = "clients.min-replies is 3; allowed: 1 to clients.per-round, which is 2"
    assert message == expected


def test_full_fine_tuning_needs_float32_weights() -> None:
    parse({"method": "sft", "model.dtype": "bfloat16"})
    message = refusal({"method": "fft", "model.dtype": "bfloat16"})
    assert message.startswith("model.dtype is 'bfloat16'; allowed: float32 for fft")


def test_slora_splits_its_rounds_in_two_phases() -> None:
    phases = make_schedule(parse({"rounds": 12, "sparse.rounds": 5}))
    assert [(p.adapter, p.rounds, p.primed) for p in phases] == [
        ("sparse", 5, False),
        ("lora", 7, True),
    ]


@pytest.mark.parametrize(
    ("method", "adapter", "rate"),
    [
        ("fft", "full", 5e-4),
        ("bitfit", "bias", 5e-3),
        ("houlsby", "houlsby", 2e-3),
        ("pfeiffer", "pfeiffer", 2e-3),
        ("head", "head", 5e-3),
        ("sft", "sparse", 1e-2),
        ("lora", "lora", 2e-3),
    ],
)
def test_one_phase_methods_have_all_rounds_and_their_own_rate(
    method: str, adapter: str, rate: float
) -> None:
    [phase] = make_schedule(parse({"method": method, "rounds": 6}))
    assert (phase.adapter, phase.rounds, phase.primed) == (adapter, 6, False)
    assert phase.recipe.lr == rate


@pytest.mark.parametrize(
    ("given", "rates"),
    [
        ({}, [(0.5, 0.5), (0.25, 0.25)]),
        ({"train.head-lr": 0.125}, [(0.5, 0.125), (0.25, 0.125)]),
        (
            {"train.head-lr": 0.125, "lora.head-lr": 0.75},
            [(0.5, 0.125), (0.25, 0.75)],
        ),
    ],
)
def test_the_head_may_learn_at_a_rate_of_its_own(
    given: dict[str, Value], rates: list[tuple[float, float]]
) -> None:
    values: dict[str, Value] = {"method": "slora", "sparse.lr": 0.5, "lora.lr": 0.25}
    schedule = make_schedule(parse(values | given))
    assert [(p.recipe.lr, p.recipe.head_lr) for p in schedule] == rates


def test_where_only_the_head_is_trained_its_rate_is_the_rate() -> None:
    values: dict[str, Value] = {"method": "head-lora", "train.head-lr": 0.125}
    head, lora = (phase.recipe for phase in make_schedule(parse(values)))
    assert (head.lr, head.head_lr) == (0.125, 0.125)
    assert (lora.lr, lora.head_lr) == (2e-3, 0.125)


def test_a_phase_changes_only_what_it_names() -> None:
    train: dict[str, Value] = {
        "train.epochs": 2,
        "train.batch-size": 8,
        "train.lr": 0.5,
        "train.weight-decay": 0.1875,
        "train.prox": 0.125,
        "train.clip-norm": 3.0,
        "train.momentum": 0.75,
        "train.precision": "bf16",
    }
    own: dict[str, Value] = {
        "sparse.epochs": 3,
        "sparse.lr": 0.1,
        "lora.batch-size": 64,
        "lora.optimizer": "sgd",
        "bottleneck.optimizer": "sgd",
    }
    sparse, lora = (phase.recipe for phase in make_schedule(parse(train | own)))
    assert (sparse.epochs, sparse.batch_size) == (3, 8)
    assert (sparse.optimizer, sparse.lr) == ("adamw", 0.1)
    assert (lora.epochs, lora.batch_size) == (2, 64)
    assert (lora.optimizer, lora.lr) == ("sgd", 0.5)
    for recipe in (sparse, lora):
        assert (recipe.weight_decay, recipe.prox, recipe.clip_norm) == (
            0.1875,
            0.125,
            3,
        )
        assert (recipe.momentum, recipe.precision) == (0.75, "bf16")


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("clients.count", 20, "0, since data.name is node"),
        ("data.validation", 0.1, "0, since data.name is node"),
        ("clients.holdout", 0.0, "above 0, since data.name is node and data.test is "),
        (
            "data.train",
            "/a.csv",
            "a path with {} for a simulated node's number",
        ),
        ("data.labels", "a", "two or more names, each once"),
        ("data.labels", "a,b,a", "two or more names, each once"),
        ("data.labels", "a,,b", "two or more names, each once"),
    ],
)
def test_own_data_refuses_what_cannot_be_with_it(
    key: str, value: Value, allowed: str
) -> None:
    parse(OWN)
    message = refusal(OWN | {key: value})
    assert message.startswith(f"{key} is {value!r}; allowed: {allowed}")


def test_own_data_needs_no_holdout_beside_test_data() -> None:
    parse(OWN | {"clients.holdout": 0.0, "data.test": "/srv/test.csv"})


ROBUST: dict[str, Value] = {
    "server.robust": "trimmed-mean",
    "server.byzantine": 2,
    "clients.min-replies": 5,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"clients.min-replies": 4},
            "clients.min-replies is 4; allowed: at least 5, since server.robust is "
            "trimmed-mean and server.byzantine is 2",
        ),
        (
            {"server.robust": "krum"},
            "clients.per-round is 5; allowed: at least 7, since server.robust is krum "
            "and server.byzantine is 2",
        ),
        (
            {"method": "fedex-lora"},
            "server.robust is 'trimmed-mean'; allowed: none, since the aggregator is "
            "exact",
        ),
        (
            {"method": "lora", "lora.ranks": "4,8"},
            "server.robust is 'trimmed-mean'; allowed: none, since lora.ranks has "
            "clients of unequal ranks",
        ),
        (
            {"server.optimizer": "fedadam"},
            "server.optimizer is 'fedadam'; allowed: none, since server.robust "
            "is trimmed-mean",
        ),
        (
            {"server.lr": 0.5},
            "server.lr is 0.5; allowed: 1.0, since server.robust is trimmed-mean",
        ),
    ],
)
def test_robust_statistics_refuse_what_cannot_be_with_them(
    changes: dict[str, Value], message: str
) -> None:
    parse(ROBUST)
    assert refusal(ROBUST | changes) == message


@pytest.mark.parametrize(
    "changes", [{"method": "sft"}, {"method": "ffa-lora"}, {"server.robust": "krum"}]
)
def test_a_statistic_of_updates_can_have_a_server_optimiser(
    changes: dict[str, Value],
) -> None:
    most = {"clients.per-round": 7, "clients.min-replies": 7}
    parse(ROBUST | most | {"server.optimizer": "fedadam"} | changes)


def test_attacks_are_for_simulations() -> None:
    message = refusal(OWN | {"attack.kind": "label-flip"})
    expected = "attack.kind is 'label-flip'; allowed: none, since data.name is node"
    assert message == expected


RANKS: dict[str, Value] = {"method": "lora", "lora.ranks": "1,2"}
BF16: dict[str, Value] = {"model.dtype": "bfloat16"}
DTYPE = "model.dtype is 'bfloat16'; allowed: float32"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rounds": 1}, "rounds is 1; allowed: at least 2 for the two phases of slora"),
        (
            {"method": "head-lora", "sparse.rounds": 0},
            "sparse.rounds is 0; allowed: at least 1 for head-lora",
        ),
        (
            {"lora.start": "federa"},
            "lora.start is 'federa'; allowed: peft for slora, whose sparse phase "
            "primes the start",
        ),
        (
            {"method": "houlsby", **BF16},
            f"{DTYPE} for houlsby, whose updates bfloat16 weights would round away",
        ),
        (
            {"sparse.schedule": "per-round", **BF16},
            f"{DTYPE}, since sparse.schedule per-round writes to the weights",
        ),
        (
            {"sparse.schedule": "per-round", "server.optimizer": "fedavgm"},
            "server.optimizer is 'fedavgm'; allowed: none, since sparse.schedule is "
            "per-round",
        ),
        (
            {"lora.aggregator": "exact", **BF16},
            f"{DTYPE}, since the aggregator exact adds to the weights",
        ),
        (
            {"method": "ffa-lora", "lora.aggregator": "exact"},
            "lora.aggregator is 'exact'; allowed: ffa, which is the one of ffa-lora",
        ),
        (
            RANKS | {"lora.aggregator": "alternate"},
            "lora.ranks is '1,2'; allowed: empty, since the aggregator is alternate; "
            "or fedavg or flexlora",
        ),
        (
            RANKS | {"method": "slora"},
            "lora.ranks is '1,2'; allowed: empty, since lora.base is residual",
        ),
        (
            RANKS | {"lora.start": "federa"},
            "lora.ranks is '1,2'; allowed: empty, since lora.start is federa",
        ),
        (
            {"lora.aggregator": "exact", "train.weight-decay": 0.5},
            "train.weight-decay is 0.5; allowed: 0, since lora.base is residual and "
            "the aggregator is exact",
        ),
        (
            {
                "method": "fedex-lora",
                "lora.start": "federa",
                "train.weight-decay": 0.5,
            },
            "train.weight-decay is 0.5; allowed: 0, since lora.start is federa and "
            "the aggregator is exact",
        ),
        (
            RANKS | {"download.lossless": True},
            "lora.ranks is '1,2'; allowed: empty, or download.dtype float32 without "
            "download.lossless",
        ),
        (
            {"method": "flexlora", "server.optimizer": "fedadam"},
            "server.optimizer is 'fedadam'; allowed: none, since the aggregator is "
            "flexlora",
        ),
        (
            {"run.dir": "/a", "run.resume": "/b"},
            "run.dir is '/a'; allowed: empty, or run.resume, which is '/b'",
        ),
    ],
)
def test_keys_that_do_not_go_together_are_named(
    values: dict[str, Value], message: str
) -> None:
    assert refusal(values) == message


@pytest.mark.parametrize(
    "values",
    [
        # What no phase reads is no hindrance.
        {"method": "lora", "sparse.schedule": "per-round", **BF16},
        {"method": "lora", "lora.start": "federa"},
        {"method": "pfeiffer", "lora.aggregator": "exact", "server.lr": 0.5, **BF16},
        {"method": "head-lora", "lora.start": "orthonormal"},
        {"method": "head-lora", "lora.ranks": "1,2"},
        {"method": "slora", "lora.ranks": "1,2", "lora.base": "w0"},
        {"method": "slora", "sparse.rounds": 0},
        {"method": "fedex-lora", "lora.aggregator": "exact"},
    ],
)
def test_keys_that_go_together_are_taken(values: dict[str, Value]) -> None:
    assert flatten(parse(values)) == DEFAULTS | values


def test_an_address_with_a_password_is_not_repeated() -> None:
    message = refusal({"data.name": "https://me:secret@host/a.csv", "rounds": 0})
    assert message.startswith("data.name is an address with a password")
    assert "secret" not in message


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[dict[str, Value]], Path]:
    def write(values: dict[str, Value]) -> Path:
        path = tmp_path / "given.toml"
        path.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items()))
        return path

    return write


def _values(kind: type, allowed: str) -> st.SearchStrategy[Value]:
    """Values of a key's type, most of which it allows, taken from its own words."""
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(0, 30)
    if kind is float:
        return st.one_of(st.floats(0, 1), st.floats(0, 1e9, exclude_min=True))
    return st.sampled_from(allowed.split(", ")) | st.text("aß/, ", max_size=3)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            key.name: _values(type(key.default), key.allowed) for key in list_keys()
        },
    )
)
def test_flattening_undoes_parsing(values: dict[str, Value]) -> None:
    # Keys that are refused are left out one by one.
    while True:
        try:
            config = parse(values)
            break
        except ConfigError as error:
            named = str(error).split(" ")[0]
            assume(named in values)
            del values[named]
    assert parse(flatten(config)) == config
    assert hash(parse(flatten(config))) == hash(config)
    is_split = config.method in ("slora", "head-lora")
    first = {"sparse.rounds": max(1, config.rounds // 3) if is_split else 4}
    assert flatten(config) == DEFAULTS | first | values


def test_keys_say_what_they_are() -> None:
    keys = list_keys()
    assert [key.name for key in keys] == [*DEFAULTS]
    for key in keys:
        assert key.name.rpartition(".")[0] == key.section
        assert key.help.endswith(".")
        assert key.help[0].isupper() or key.help[0] == "`"
    by_name = {key.name: key for key in keys}
    assert by_name["clients.per-round"].type == "integer"
    assert by_name["train.lr"].type == "float"
    assert by_name["upload.feedback"].type == "boolean"
    assert by_name["upload.feedback"].allowed == "true or false"
    assert by_name["method"].type == "string"
    assert by_name["sparse.density"].allowed == "a number above 0 up to 1"
    aggregators = "fedavg, ffa, alternate, exact, flexlora"
    assert by_name["lora.aggregator"].allowed == aggregators


@pytest.mark.parametrize("values", [{}, CHANGED], ids=["defaults", "changed"])
def test_the_printed_file_is_a_run_config(
    values: dict[str, Value],
    tmp_path: Path,
    toml: Callable[[dict[str, Value]], Path],
) -> None:
    printed = CliRunner().invoke(app, ["config", "-c", str(toml(values))])
    assert printed.exit_code == 0, printed.output
    path = tmp_path / "run.toml"
    path.write_text(printed.stdout)
    assert parse_config_args([str(path)]) == DEFAULTS | values
    comments = [line for line in printed.stdout.splitlines() if line[:1] == "#"]
    assert max(map(len, comments)) <= 88
    text = " ".join(line[2:] for line in comments)
    for key in list_keys():
        assert f"{key.help} Allowed: {key.allowed}. Default: " in text


def test_what_cannot_be_is_not_printed() -> None:
    done = CliRunner().invoke(app, ["config", "-c", "rounds=0"])
    assert done.exit_code == 2
    assert done.stderr == "Error: rounds is 0; allowed: a number from 1 up to 1000000\n"
    assert not done.stdout


def test_sections_of_adapters_are_known_without_them() -> None:
    for name in ADAPTERS:
        assert section_of(name) == find_adapter(name).section


def test_keys_need_no_torch() -> None:
    code = (
        "import sys\n"
        "from slora_flwr.config import ConfigError, RunConfig, flatten, list_keys, "
        "parse\n"
        "flatten(RunConfig()), list_keys()\n"
        "for refused in {'rounds': 1}, {'lora.rank': 0}, {'clients.per-round': 21}:\n"
        "    try:\n"
        "        parse(refused)\n"
        "    except ConfigError:\n"
        "        assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_config_is_checked_without_peft() -> None:
    code = (
        "import sys\n"
        "from slora_flwr.config import parse\n"
        "parse({'sparse.schedule': 'per-round', 'lora.aggregator': 'exact'})\n"
        "assert not {'peft', 'transformers', 'datasets'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_methods_and_aggregators_from_outside_are_allowed(tmp_path: Path) -> None:
    facts = tmp_path / "outside-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Name: outside\nVersion: 1\n")
    (facts / "entry_points.txt").write_text(
        "[slora_flwr.methods]\nown-lora = outside:method\n"
        "[slora_flwr.aggregators]\nown = outside:Own\n"
    )
    (tmp_path / "outside.py").write_text(
        "from slora_flwr.aggregation.base import Aggregator\n"
        "from slora_flwr.config.methods import Method, PhaseRow\n"
        "class Own(Aggregator):\n"
        "    steps = is_mean = False\n"
        "method = Method((PhaseRow('lora', 'own'),), 'LoRA with another aggregator')\n"
    )
    code = (
        "from slora_flwr.config import ConfigError, list_keys, parse\n"
        "from slora_flwr.config.schedule import make_schedule\n"
        "for values in {'method': 'own-lora'}, {'lora.aggregator': 'own'}:\n"
        "    print(make_schedule(parse(values))[-1].aggregator)\n"
        "print({k.name: k.allowed for k in list_keys()}['method'].split(', ')[-1])\n"
        "for values in {'server.lr': 0.5}, {'server.robust': 'median'}:\n"
        "    try:\n"
        "        parse({'method': 'own-lora'} | values)\n"
        "    except ConfigError as error:\n"
        "        print(error)\n"
    )
    places = [str(tmp_path), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [
        "own",
        "own",
        "own-lora",
        "server.lr is 0.5; allowed: 1.0, since the aggregator is own",
        "server.robust is 'median'; allowed: none, since the aggregator is own",
    ]


def test_aggregators_of_factors_need_a_low_rank_adapter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    odd = methods.Method((methods.PhaseRow("bias", "exact"),), "none that can run")
    monkeypatch.setitem(methods.METHODS, "odd", odd)
    with pytest.raises(ConfigError, match="method is 'odd'; allowed: a low-rank adap"):
        parse({"method": "odd"})


def test_other_aggregators_than_means_take_no_robust_statistic_nor_privacy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else that of a package outside would be left out in silence."""
    assert not find_aggregator("fedavg").__base__.is_mean
    own = methods.Method((methods.PhaseRow("bias", "root"),), "the root class alone")
    monkeypatch.setitem(methods.METHODS, "own", own)
    where = "slora_flwr.aggregation.base:Aggregator"
    monkeypatch.setitem(methods.AGGREGATORS, "root", where)
    parse({"method": "own"})
    for values, error in (
        ({"server.robust": "median"}, "server.robust is 'median'; allowed: none"),
        ({"privacy.epsilon": 8.0, "privacy.clip-norm": 1.0}, "method is 'own'; allow"),
    ):
        with pytest.raises(ConfigError, match=error):
            parse({"method": "own", **values})
