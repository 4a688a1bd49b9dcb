"""experiments/flowertune: planned for real models, run with tiny ones."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from transformers import MistralConfig

from slora_flwr.config import RunConfig, parse
from slora_flwr.config.arguments import merge_arguments, read_file
from slora_flwr.config.schedule import make_schedule
from slora_flwr.data.presets import DIALOGUES
from slora_flwr.planning.memory import plan_memory
from slora_flwr.planning.outline import outline
from slora_flwr.planning.rounds import plan_rounds, population
from slora_flwr.training.trainer import Trainer
from tests.support.causal import save_language_model, save_outline
from tests.support.grids import Grid
from tests.support.runs import Config, events, start, summary

FOLDER = Path(__file__).parents[2] / "experiments" / "flowertune"
# Clients and clients a round, as `flwr new` has them.
SETTINGS = {"general": (20, 2), "finance": (50, 5), "medical": (20, 2), "code": (10, 2)}
ANSWERS = ["w7", "w8", "w9"]


def read(name: str, *changes: str) -> RunConfig:
    return parse(merge_arguments([str(FOLDER / f"{name}.toml"), *changes]))


@pytest.mark.parametrize("name", SETTINGS)
def test_the_settings_are_planned_for_mistral(name: str, tmp_path: Path) -> None:
    save_outline(MistralConfig(vocab_size=32768), tmp_path)
    config = read(name, f"model.name='{tmp_path}'")
    assert (config.clients.count, config.clients.per_round) == SETTINGS[name]
    assert config.data.name in DIALOGUES
    shapes = outline(config)
    rounds = plan_rounds(config, shapes, population(config))
    # 32 blocks: queries of 4096, and values that 4 heads share; both factors.
    values = 32 * 32 * (4096 + 4096 + 4096 + 1024)
    assert len(rounds) == 200
    assert {r.up for r in rounds} == {4 * values * SETTINGS[name][1]}
    [phase] = make_schedule(config)
    needed = plan_memory(phase, config, shapes)
    assert needed.weights == 2 * shapes.size
    assert needed.trained == 4 * values
    # On a GPU of 80 GB without quantisation, thanks to checkpointing.
    assert needed.total < 40e9


@pytest.mark.parametrize("method", ["lora", "slora"])
@pytest.mark.parametrize("name", SETTINGS)
def test_rates_follow_the_templates_cosine(name: str, method: str) -> None:
    """From 5e-5 on, and towards 0 where the template's end at 1e-6.

    A phase's first round has the whole rate: the template's round 0.
    """
    config = read(name, f"method={method}", "sparse.rounds=40")
    for phase in make_schedule(config):
        for number in range(1, phase.rounds + 1):
            turned = (1 + math.cos(math.pi * (number - 1) / phase.rounds)) / 2
            rate = phase.at(number).recipe.lr
            assert rate == pytest.approx(5e-5 * turned, abs=1e-12)
            assert 0 <= 1e-6 + (5e-5 - 1e-6) * turned - rate <= 1e-6


@pytest.mark.parametrize("name", SETTINGS)
def test_the_settings_run_with_a_tiny_mistral(name: str, tmp_path: Path) -> None:
    data = tmp_path / "instructions.csv"
    with data.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["instruction", "input", "output"])
        for i in range(400):
            rows.writerow([f"w{10 + i % 7}", f"w{20 + i}", ANSWERS[i % 3]])
    changes: Config = {
        "model.name": str(save_language_model("mistral", tmp_path / "model")),
        "data.name": str(data),
        "data.text": "instruction,input",
        "data.response": "output",
        "data.max-length": 40,
        "clients.count": 5,
        "clients.per-round": 2,
        "rounds": 3,
        "train.batch-size": 2,
        "train.lr": 1e-2,
        "run.eval-every": 1,
        "run.dir": str(tmp_path / "run"),
    }
    config = read_file(FOLDER / f"{name}.toml") | changes
    config["lora.rank"] = 4
    trainer = Trainer(parse(config))
    sizes = trainer.data.partition.sizes
    assert sizes.max() > 1.5 * np.median(sizes)  # not dealt evenly
    template = trainer.data.encoder.template  # type: ignore[attr-defined]
    prompt = template.prompt([{"role": "user", "content": "w10", "input": "w20"}])
    assert "### Input:\nw20\n" in prompt
    directory = start(config, Grid(config))
    assert summary(directory)["rounds"] == 3
    losses = [done["loss"] for done in events(directory, "round")]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
