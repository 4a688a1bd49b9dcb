"""experiments/causal.toml, cut to two short rounds, lowers the perplexity."""

import math
import re
from pathlib import Path

import pytest

from slora_flwr.config import parse
from slora_flwr.config.arguments import read_file
from slora_flwr.training.loop import evaluate
from slora_flwr.training.trainer import Trainer
from tests.support.grids import Grid
from tests.support.runs import Config, events, start

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "causal.toml"


def test_the_embedded_language_model_learns_to_summarise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config: Config = read_file(EXPERIMENT) | {
        "rounds": 2,
        "sparse.rounds": 1,
        "clients.per-round": 3,
        "train.steps": 6,
        "data.max-test": 60,
        "run.dir": str(tmp_path / "run"),
    }
    trainer = Trainer(parse(config))
    trainer.model.detach()
    test = trainer.data.tokenised.test
    pretrained = math.exp(evaluate(trainer.model.backbone, test).loss)
    capsys.readouterr()
    rounds = events(start(config, Grid(config)), "round")
    assert [done["phase"] for done in rounds] == ["sparse", "lora"]
    assert rounds[0]["perplexity"] < 0.9 * pretrained
    assert rounds[1]["perplexity"] < rounds[0]["perplexity"]
    table, _, samples = capsys.readouterr().out.partition("answers to test prompts")
    assert re.search(r"slora +│ +2 │", table)
    for row in ("prompt", "right", "before", "after"):
        assert samples.count(f"│ {row} ") == 3
