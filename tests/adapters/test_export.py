"""What is exported computes the same in stock transformers and PEFT."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
)

from slora_flwr.adapters import FullAdapter, LowRankAdapter, SparseAdapter
from slora_flwr.adapters.bottleneck import (
    BOTTLENECK_FILE,
    apply_bottlenecks,
    export_bottlenecks,
)
from slora_flwr.adapters.export import (
    PATCH_FILE,
    apply_base_patch,
    export_adapter,
    load_adapter,
)
from slora_flwr.adapters.masks import make_mask
from slora_flwr.adapters.model_files import (
    export_classes,
    export_model,
    export_tokenizer,
    read_classes,
)
from slora_flwr.backbone.load import Backbone
from slora_flwr.config import LoraConfig, RecipeConfig
from slora_flwr.config.methods import find_adapter
from slora_flwr.data.examples import Examples
from slora_flwr.training.loop import train
from tests.support.tiny import (
    LABELS,
    hand_over,
    load_tiny,
    logits,
    make_examples,
    save_checkpoint,
)

RECIPE = RecipeConfig(epochs=1, batch_size=8, lr=0.02)
RANK, ALPHA, DENSITY = 4, 12.0, 0.1


def load_stock(folder: Path) -> Any:
    """Load a checkpoint as a user would, with a head of another seed."""
    torch.manual_seed(99)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=LABELS)


def run_and_export(
    backbone: Backbone, examples: Examples, base: str, out: Path
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Train both phases and export; give the live logits and the sparse state."""
    sparse = SparseAdapter(DENSITY, "unstructured", 5)
    sparse.attach(backbone)
    train(backbone, sparse, examples, RECIPE, (0, 1, 0))
    learned = sparse.state()
    config = LoraConfig(rank=RANK, alpha=ALPHA, base=base)
    done = hand_over(backbone, sparse, learned, config)
    frozen = done.base.apply(backbone) if done.base is not None else {}
    lora = LowRankAdapter(RANK, ALPHA, frozen=frozen)
    lora.attach(backbone)
    lora.load(done.state)
    train(backbone, lora, examples, RECIPE, (0, 2, 0))
    live, state = logits(backbone.model, examples), lora.state()
    lora.detach()
    if done.base is not None:
        done.base.remove(backbone)
    export_adapter(out, backbone, state, RANK, ALPHA / RANK, done.base)
    return live, learned


@pytest.mark.parametrize("base", ["residual", "w0", "warm-start"])
def test_stock_peft_computes_the_same(
    folder: Path, backbone: Backbone, examples: Examples, tmp_path: Path, base: str
) -> None:
    live, _ = run_and_export(backbone, examples, base, tmp_path)
    model = load_stock(folder)
    assert (logits(model, examples) - live).abs().max() > 0.1
    assert (tmp_path / PATCH_FILE).exists() == (base != "w0")
    if base == "w0":
        loaded = PeftModel.from_pretrained(model, str(tmp_path))
    else:
        with pytest.raises(KeyError, match=r"README\.md tells how to load"):
            PeftModel.from_pretrained(model, str(tmp_path))
        loaded = load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(loaded, examples), live, rtol=0, atol=1e-5)
    config = loaded.peft_config["default"]
    assert isinstance(config, PeftLoraConfig)
    assert config.r == (2 * RANK if base == "residual" else RANK)
    assert config.lora_alpha / config.r == ALPHA / RANK


@pytest.mark.parametrize("base", ["residual", "warm-start"])
def test_patch_file_holds_the_sparse_values(
    tiny_models: dict[str, Path], examples: Examples, tmp_path: Path, base: str
) -> None:
    backbone = load_tiny(tiny_models["bert"])
    digest, names = backbone.digest, list(backbone.targets)
    shapes = {n: tuple(m.weight.shape) for n, m in backbone.targets.items()}
    _, learned = run_and_export(backbone, examples, base, tmp_path)
    arrays = load_file(tmp_path / PATCH_FILE)
    parts = ("positions", "values")
    assert set(arrays) == {f"{n}.weight.{part}" for n in names for part in parts}
    for name, shape in shapes.items():
        positions = arrays[f"{name}.weight.positions"]
        mask = make_mask(5, name, (shape[0], shape[1]), DENSITY)
        np.testing.assert_array_equal(positions.numpy(), mask)
        assert torch.equal(arrays[f"{name}.weight.values"], learned[f"{name}.values"])
        assert len(positions) / (shape[0] * shape[1]) == pytest.approx(DENSITY, abs=0.1)
    with safe_open(tmp_path / PATCH_FILE, "pt") as file:
        assert file.metadata() == {"base": digest}


def test_patch_changes_the_masked_entries_alone(
    tiny_models: dict[str, Path], examples: Examples, tmp_path: Path
) -> None:
    backbone = load_tiny(tiny_models["albert"])
    targets = {f"{name}.weight" for name in backbone.targets}
    run_and_export(backbone, examples, "residual", tmp_path)
    before, model = load_stock(tiny_models["albert"]), load_stock(tiny_models["albert"])
    apply_base_patch(model, tmp_path / PATCH_FILE)
    for name, parameter in model.named_parameters():
        moved = (parameter != before.get_parameter(name)).float().mean()
        if name in targets:
            assert 0.9 * DENSITY < moved < 1.05 * DENSITY
        else:
            assert moved == 0


def test_adapter_of_some_targets(
    tiny_models: dict[str, Path], examples: Examples, tmp_path: Path
) -> None:
    backbone = load_tiny(tiny_models["distilbert"], "q_lin,lin1")
    live, _ = run_and_export(backbone, examples, "residual", tmp_path)
    model = load_stock(tiny_models["distilbert"])
    loaded = load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(loaded, examples), live, rtol=0, atol=1e-5)


def test_head_that_the_checkpoint_lacks_is_exported(
    tiny_models: dict[str, Path], examples: Examples, tmp_path: Path
) -> None:
    """A pooler inside the body, fresh and so part of the head."""
    torch.manual_seed(12)
    config = BertConfig.from_pretrained(tiny_models["bert"])
    body = BertModel(config, add_pooling_layer=False)
    folder = save_checkpoint(body, tmp_path / "checkpoint")
    out = tmp_path / "adapter"
    live, _ = run_and_export(load_tiny(folder), examples, "w0", out)
    loaded = PeftModel.from_pretrained(load_stock(folder), str(out))
    torch.testing.assert_close(logits(loaded, examples), live, rtol=0, atol=1e-5)


def test_stock_transformers_computes_the_same(
    backbone: Backbone, examples: Examples, tmp_path: Path
) -> None:
    adapter = FullAdapter()
    adapter.attach(backbone)
    train(backbone, adapter, examples, RECIPE, (0, 1, 0))
    live = logits(backbone.model, examples)
    export_model(tmp_path, backbone, ["a", "b", "c"])
    export_tokenizer(tmp_path, backbone.tokenizer, 7)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(model, examples), live, rtol=0, atol=1e-6)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "w7 w119 unheard"
    assert tokenizer(text)["input_ids"] == [7, 119, 1]
    assert tokenizer(text)["input_ids"] == backbone.tokenizer(text)["input_ids"]
    assert tokenizer("w7 " * 20, truncation=True)["input_ids"] == [7] * 7
    assert backbone.tokenizer.model_max_length != 7


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer"])
def test_bottlenecks_are_exported_beside_their_model(
    backbone: Backbone, examples: Examples, tmp_path: Path, kind: str
) -> None:
    adapter = find_adapter(kind)(8)
    adapter.attach(backbone)
    train(backbone, adapter, examples, RECIPE, (0, 1, 0))
    live = logits(backbone.model, examples)
    export_model(tmp_path, backbone, ["a", "b", "c"])
    export_bottlenecks(tmp_path, adapter.state(), kind, 8)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert (logits(model, examples) - live).abs().max() > 1e-4
    apply_bottlenecks(model, tmp_path / BOTTLENECK_FILE)
    torch.testing.assert_close(logits(model, examples), live, rtol=0, atol=1e-6)


def test_sparse_model_is_exported_whole(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    backbone, examples = load_tiny(tiny_models["roberta"]), make_examples(16, seed=2)
    adapter = SparseAdapter(DENSITY, "unstructured", 5)
    adapter.attach(backbone)
    train(backbone, adapter, examples, RECIPE, (0, 1, 0))
    live = logits(backbone.model, examples)
    export_model(tmp_path, backbone, ["a", "b", "c"])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(model, examples), live, rtol=0, atol=1e-6)


def test_classes_are_in_the_order_of_their_ids(tmp_path: Path) -> None:
    export_classes(tmp_path, ["sport", "arts", "ärzte"])
    written = (tmp_path / "classes.json").read_text()
    assert json.loads(written) == ["sport", "arts", "ärzte"]
    assert read_classes(tmp_path) == ["sport", "arts", "ärzte"]
