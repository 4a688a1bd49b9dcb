"""Plans from config.json alone: the same figures as with weights, and no weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config
from typer.testing import CliRunner

from slora_flwr.backbone.load import Backbone
from slora_flwr.cli import app
from slora_flwr.config import ConfigError, RunConfig, parse
from slora_flwr.config.schedule import make_schedule
from slora_flwr.planning.memory import plan_memory
from slora_flwr.planning.outline import outline
from slora_flwr.planning.rounds import plan_rounds
from slora_flwr.training.trainer import Trainer
from tests.support.causal import (
    FAMILIES,
    MIXTURES,
    save_language_model,
    save_outline,
    write_dialogues,
)
from tests.support.runs import Config

METHODS = ("fft", "slora", "lora", "ffa-lora", "fedex-lora")
LLAMA_1B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
LLAMA_70B = LLAMA_1B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "tie_word_embeddings": False,
}
QWEN_7B: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
# As their config.json says; Mistral-7B-v0.3's is the class's default but for its words.
LARGE: dict[str, tuple[PreTrainedConfig, int]] = {
    "Llama-3.2-1B": (LlamaConfig(**LLAMA_1B), 1_235_814_400),
    "Mistral-7B-v0.3": (MistralConfig(vocab_size=32768), 7_248_023_552),
    "Qwen2.5-7B": (Qwen2Config(**QWEN_7B), 7_615_616_512),
    "Llama-3-70B": (LlamaConfig(**LLAMA_70B), 70_553_706_496),
}


def causal(model: Path, data: Path, **changes: Any) -> RunConfig:
    config: Config = {
        "task": "causal-lm",
        "rounds": 3,
        "model.name": str(model),
        "data.name": str(data),
        "data.max-length": 24,
        "clients.by": "category",
        "clients.count": 3,
        "clients.per-round": 2,
        "sparse.rounds": 2,
    }
    return parse(config | changes)


def assert_planned_alike(config: RunConfig, weights: Backbone) -> None:
    shapes = outline(config)
    assert (shapes.size, shapes.head_size) == (weights.size, weights.head_size)
    assert [*shapes.targets] == [*weights.targets]
    clients = [0, 1, 2]
    assert plan_rounds(config, shapes, clients) == plan_rounds(config, weights, clients)
    for phase in make_schedule(config):
        found = plan_memory(phase, config, shapes)
        known = plan_memory(phase, config, weights)
        assert replace(found, activations=0) == replace(known, activations=0)
        # Heads that share keys and values are repeated, where a CPU may not have to.
        assert known.activations <= found.activations <= 1.25 * known.activations


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {*MIXTURES}))
def test_an_outline_is_planned_as_the_model(family: str, tmp_path: Path) -> None:
    model = save_language_model(family, tmp_path / "model")
    data = write_dialogues(tmp_path / "dialogues.csv")
    weights = Trainer(causal(model, data)).model.backbone
    for method in METHODS:
        assert_planned_alike(causal(model, data, method=method), weights)


def test_other_masks_and_biases_of_an_outline(tmp_path: Path) -> None:
    model = save_language_model("gpt2", tmp_path / "model")
    data = write_dialogues(tmp_path / "dialogues.csv")
    weights = Trainer(causal(model, data)).model.backbone
    assert_planned_alike(causal(model, data, method="bitfit"), weights)
    for mask in ("rows", "columns"):
        changes = {"method": "slora", "sparse.mask": mask}
        assert_planned_alike(causal(model, data, **changes), weights)


def test_an_outline_of_a_classifier(config: Config, tmp_path: Path) -> None:
    settings = parse(config | {"method": "slora"})
    weights = Trainer(settings).model.backbone
    assert weights.head_size
    assert_planned_alike(settings, weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_half_precision_of_an_outline(dtype: str, tmp_path: Path) -> None:
    model = save_language_model("llama", tmp_path / "model")
    data = write_dialogues(tmp_path / "dialogues.csv")
    for precision in ("float32", "bf16"):
        changes = {"model.dtype": dtype, "train.precision": precision}
        config = causal(model, data, method="slora", **changes)
        assert_planned_alike(config, Trainer(config).model.backbone)


def test_masks_of_rounds_have_their_expected_union(tmp_path: Path) -> None:
    model = save_language_model("llama", tmp_path / "model")
    data = write_dialogues(tmp_path / "dialogues.csv")
    changes = {"method": "slora", "sparse.schedule": "per-round"}
    config = causal(model, data, **changes)
    [_, low_rank] = make_schedule(config)
    layout = low_rank.adapter_type.base_layout
    _, found, _ = layout(low_rank, config, outline(config), 2)
    _, drawn, _ = layout(low_rank, config, Trainer(config).model.backbone, 2)
    found_size, drawn_size = (sum(map(len, p.values())) for p in (found, drawn))
    assert found_size == pytest.approx(drawn_size, rel=0.02)


@pytest.mark.parametrize("name", LARGE)
def test_large_models_take_no_memory(name: str, tmp_path: Path) -> None:
    described, size = LARGE[name]
    save_outline(described, tmp_path)
    changes = {"method": "slora", "model.dtype": "bfloat16", "data.max-length": 512}
    config = causal(tmp_path, tmp_path / "none.csv", **changes)
    shapes = outline(config)
    assert shapes.size == size
    assert all(isinstance(p, FakeTensor) for p in shapes.model.parameters())
    sparse, low_rank = (
        plan_memory(phase, config, shapes) for phase in make_schedule(config)
    )
    assert sparse.weights == low_rank.weights == 2 * size
    values = round(0.01 * shapes.target_size)
    assert sparse.trained / 4 == pytest.approx(values, rel=1e-3)
    [first, *_] = plan_rounds(config, shapes, [0, 1, 2])
    assert first.up == 2 * sparse.trained


def test_checkpointing_keeps_the_inputs_of_blocks(tmp_path: Path) -> None:
    """One block's activations, and all blocks' inputs: 16 x 24 tokens of 32 values."""
    model = save_language_model("llama", tmp_path / "model")
    data = write_dialogues(tmp_path / "dialogues.csv")
    whole, again = (
        plan_memory(make_schedule(config)[0], config, outline(config))
        for on in (False, True)
        for config in [causal(model, data, method="fft", **{"train.checkpointing": on})]
    )
    blocks, block_input = 2, 4 * 16 * 24 * 32
    outside = again.activations - blocks * block_input
    # The first block also keeps the table of positions, which all share.
    kept = outside + blocks * again.again
    assert whole.activations == pytest.approx(kept, rel=1e-3)
    # A few masks and norms.
    assert 0 < outside < 0.2 * again.again


def test_logits_are_bounded(tmp_path: Path) -> None:
    described, _ = LARGE["Llama-3.2-1B"]
    save_outline(described, tmp_path)
    logits = 128256 * (2**24 // 128256)
    # Log-probabilities and two gradients, in bf16 too.
    for dtype in ("float32", "bfloat16"):
        changes = {"method": "lora", "model.dtype": dtype}
        config = causal(tmp_path, tmp_path / "none.csv", **changes)
        [phase] = make_schedule(config)
        assert plan_memory(phase, config, outline(config)).outputs == 12 * logits


def plan(path: Path, config: Config, *options: str) -> str:
    path.write_text(tomli_w.dumps(config))
    arguments = ["plan", "-c", str(path), *options]
    found = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    assert found.exit_code == 0, found.output
    return found.output


def test_the_command_needs_no_weights(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    config |= {"method": "slora"}
    known = plan(path, config)
    assert "without weights" not in known
    told = "Planned from config.json, without weights."
    found = plan(path, config, "--no-weights")
    assert found.startswith(known)
    assert told in found
    folder = Path(str(config["model.name"]))
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    try:
        assert plan(path, config) == found
    finally:
        (tmp_path / "elsewhere").rename(folder / "model.safetensors")


def test_an_outline_is_checked_as_the_model(tmp_path: Path) -> None:
    """By table of positions and by rank, before anything is planned."""
    model = save_language_model("gpt2", tmp_path / "model")
    (model / "model.safetensors").unlink()
    data = tmp_path / "none.csv"
    for changes, told in (
        ({"data.max-length": 41}, "data.max-length is 41; allowed: 4 to 40"),
        ({"lora.rank": 33}, "lora.rank is 33; allowed: 1 to 32"),
    ):
        with pytest.raises(ConfigError, match=told):
            outline(causal(model, data, method="lora", **changes))


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_of_experts_are_refused(family: str, tmp_path: Path) -> None:
    model = save_language_model(family, tmp_path / "model")
    changes = {"method": "lora", "lora.targets": MIXTURES[family]}
    with pytest.raises(ConfigError, match="a mixture of experts"):
        outline(causal(model, tmp_path / "none.csv", **changes))


def test_random_numbers_are_not_drawn(tmp_path: Path) -> None:
    """A plan in a process that trains would change what it trains."""
    model = save_language_model("llama", tmp_path / "model")
    config = causal(model, tmp_path / "none.csv", method="slora")
    before = torch.get_rng_state()
    shapes = outline(config)
    for phase in make_schedule(config):
        plan_memory(phase, config, shapes)
    assert torch.equal(torch.get_rng_state(), before)
