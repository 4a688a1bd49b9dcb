"""The plan of a step's memory, beside what PyTorch allocates in it."""

import csv
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile

from slora_flwr.config import parse
from slora_flwr.config.schedule import make_schedule
from slora_flwr.planning.memory import plan_memory
from slora_flwr.tasks import causal_lm
from slora_flwr.training.trainer import Trainer
from tests.support.causal import save_language_model
from tests.support.runs import Config

LENGTH, BATCH, WORDS = 32, 16, 4000
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "vocab_size": WORDS,
    "initializer_range": 0.02,
}
SMALLER: dict[str, Config] = {
    "plain": {},
    "parts": {"train.accumulate": 4},
    "tokens": {"train.tokens": 4 * LENGTH},
    "checkpointing": {"train.checkpointing": True},
    "both": {"train.accumulate": 4, "train.checkpointing": True},
    "short": {"train.batch-size": 1},
}
# Methods, whether embeddings are tied, and in how many chunks the loss is computed.
CASES = [("fft", True, 8), ("fft", False, 1), ("lora", True, 8), ("sft", False, 8)]
# All ways to take less with the first, and each of the others once more.
PLANNED = [(*CASES[0], smaller) for smaller in SMALLER]
PLANNED += [(*case, "plain") for case in CASES[1:]]
PLANNED += [
    (*CASES[1], "checkpointing"),
    (*CASES[1], "both"),
    (*CASES[2], "tokens"),
    (*CASES[2], "both"),
    (*CASES[3], "parts"),
    (*CASES[3], "short"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Models with embeddings tied and not."""
    root = tmp_path_factory.mktemp("models")
    return {
        tied: save_language_model(
            "llama", root / str(tied), tie_word_embeddings=tied, **SIZES
        )
        for tied in (True, False)
    }


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two batches of texts that fill the length."""
    folder = tmp_path_factory.mktemp("texts")
    for split in ("train", "test"):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["text"])
            rows.writerows([f"w{i} " + "w3 " * LENGTH] for i in range(2 * BATCH))
    return folder


def allocated(trainer: Trainer) -> int:
    """Return the most bytes that a client's training has allocated at a time."""
    phase = trainer.schedule[0]
    adapter = trainer.model.attach(phase, None)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        trainer.train_client(0, adapter.state(), phase, 1)
    in_use = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            in_use += event.nbytes()
            most = max(most, in_use)
    return most


@pytest.mark.parametrize(("method", "tied", "chunks", "smaller"), PLANNED)
def test_a_step_allocates_what_is_planned(
    method: str,
    tied: bool,
    chunks: int,
    smaller: str,
    folders: dict[bool, Path],
    texts: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config: Config = {
        "task": "causal-lm",
        "method": method,
        "model.name": str(folders[tied]),
        "data.name": str(texts),
        "data.test": "test.csv",
        "data.text": "text",
        "data.template": "plain",
        "data.max-length": LENGTH,
        "clients.count": 1,
        "clients.per-round": 1,
        "clients.partitioner": "iid",
        "train.batch-size": BATCH,
        "train.steps": 2,
    }
    settings = parse(config | SMALLER[smaller])
    [phase] = make_schedule(settings)
    rows = phase.recipe.most_rows(LENGTH)
    monkeypatch.setattr(causal_lm, "_MOST_LOGITS", rows * LENGTH * WORDS // chunks)
    trainer = Trainer(settings)
    plan = plan_memory(phase, settings, trainer.model.backbone)
    planned = plan.total - plan.weights - plan.aside - plan.trained
    assert planned == pytest.approx(allocated(trainer), rel=0.1)
