"""Whole runs on a second device, where no tensor of the CPU may be mixed in.

In a process of their own: PyTorch takes on a device before it first computes.
"""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from slora_flwr.backbone import load
from slora_flwr.client.process import make_process
from slora_flwr.config.methods import METHODS
from slora_flwr.server.export import export_run
from slora_flwr.server.predict import predict_texts
from tests.support.grids import Grid
from tests.support.runs import (
    INT8,
    Config,
    differ,
    elsewhere,
    events,
    make_config,
    start,
    summary,
)
from tests.support.second_device import add_second_device
from tests.support.tiny import make_body, save_checkpoint

BF16: Config = {"train.precision": "bf16"}
CAUSAL: Config = {"task": "causal-lm", "run.generate": 2, "run.max-tokens": 3}
RUNS: dict[str, Config] = {
    **{method: {"method": method} for method in METHODS},
    **{f"{method} in bf16": {"method": method, **BF16} for method in METHODS},
    "slora-ffa": {"method": "slora", "lora.aggregator": "ffa"},
    "slora-exact": {"method": "slora", "lora.aggregator": "exact"},
    "slora-warm": {"method": "slora", "lora.base": "warm-start"},
    "per-round-slora": {
        "method": "slora",
        "sparse.schedule": "per-round",
        "sparse.rounds": 2,
        "rounds": 3,
    },
    "rows": {"method": "sft", "sparse.schedule": "per-round", "sparse.mask": "rows"},
    "columns": {"method": "slora", "sparse.mask": "columns", **BF16},
    "open": {"method": "slora", "sparse.rounds": 0, "rounds": 3},
    "federa": {"method": "ffa-lora", "lora.start": "federa"},
    "ranks": {"method": "flexlora", "lora.ranks": "1,2,4"},
    "coded": INT8 | {"method": "slora"},
    "bfloat16": {"method": "slora", "model.dtype": "bfloat16"},
    "pulled": {
        "method": "slora",
        "train.weight-decay": 0.1,
        "train.prox": 0.1,
        "train.clip-norm": 0.5,
        "train.checkpointing": True,
        "train.accumulate": 2,
    },
    "sgd": {"method": "slora", "train.optimizer": "sgd", "train.weight-decay": 0.1},
    "causal": {"method": "slora", **CAUSAL},
    "causal in bf16": {"method": "fedex-lora", **CAUSAL, **BF16},
    "causal fft": {"method": "fft", **CAUSAL},
}
AGAIN = ("slora", "per-round-slora", "houlsby", "causal")


@pytest.fixture(scope="module")
def second() -> Iterator[ProcessPoolExecutor]:
    """A process that computes on a second device."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, _begin) as pool:
        yield pool


def _begin() -> None:
    device = add_second_device()
    torch.set_num_threads(1)
    load.best_device = lambda: device


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT without dropout, whose kernel rounds as it likes on each device."""
    torch.manual_seed(11)
    body = make_body("bert")
    body.config.hidden_dropout_prob = 0.0
    body.config.attention_probs_dropout_prob = 0.0
    return save_checkpoint(body, tmp_path_factory.mktemp("bert"))


@pytest.fixture
def config(corpus: Path, model: Path, tmp_path: Path) -> Config:
    # Masks so dense that a CPU too gathers their gradients from the dense product.
    config = make_config(corpus, model, tmp_path / "run")
    return config | {"clients.per-round": 2, "rounds": 2, "sparse.density": 0.2}


def compute(config: Config, *, again: bool) -> tuple[str, object]:
    """Run; read what the run kept `again`, export it, and predict.

    Returns the name of the device, and the answers.
    """
    make_process.cache_clear()
    answers = None
    with sdpa_kernel(SDPBackend.MATH):  # the only kernel of the second device
        directory = start(config, Grid(config))
        if again:
            export_run(directory, "averaged", False, directory / "exported")
            answers = predict_texts(directory, "last", ["w5 w6", "w40 w41 w42"])
    return load.best_device().type, answers


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_a_second_device_is_that_on_the_cpu(
    config: Config, causal: Config, second: ProcessPoolExecutor, name: str
) -> None:
    config |= causal if "task" in RUNS[name] else {}
    config |= RUNS[name]
    there = elsewhere(config)
    again = name in AGAIN
    one, there_answered = second.submit(compute, there, again=again).result()
    other, answered = compute(config, again=again)
    assert (one, other) == ("second", "cpu")
    assert there_answered == answered
    expected, found = (Path(str(c["run.dir"])) for c in (config, there))
    assert not events(found, "failure")
    tensors = [*expected.rglob("*.safetensors")]
    assert len(tensors) > 3
    for path in tensors:
        given = load_file(found / path.relative_to(expected))
        assert not differ(load_file(path), given), path.name
    assert summary(found)["loss"] == summary(expected)["loss"]


@pytest.mark.parametrize("method", ["slora", "fft", "houlsby"])
def test_private_gradients_are_computed_on_a_second_device(
    config: Config, second: ProcessPoolExecutor, method: str
) -> None:
    """Their noise is nobody's to foresee, so there is nothing to compare with."""
    config |= {"method": method, "privacy.unit": "example", "privacy.epsilon": 8.0}
    config |= {"privacy.clip-norm": 1.0, "privacy.delta": 0.01}
    second.submit(compute, config, again=False).result()
    directory = Path(str(config["run.dir"]))
    assert not events(directory, "failure")
    assert (directory / "summary.json").exists()
