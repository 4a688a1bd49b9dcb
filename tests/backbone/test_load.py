"""Backbones of each family: head, targets, padding, and models that are not there."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from slora_flwr.backbone.load import Backbone, load_backbone
from slora_flwr.config import ConfigError, ModelConfig
from slora_flwr.data.examples import Examples
from tests.support.tiny import (
    load_tiny,
    logits,
    make_body,
    make_tokenizer,
    save_checkpoint,
)

HEADS = {
    "bert": ["classifier"],
    "distilbert": ["pre_classifier", "classifier"],
    "roberta": ["classifier.dense", "classifier.out_proj"],
    "albert": ["classifier"],
    "deberta-v2": ["pooler.dense", "classifier"],
}
BERT_LAYER = [
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]
TARGETS = {
    "bert": [f"bert.encoder.layer.{i}.{n}" for i in (0, 1) for n in BERT_LAYER],
    "distilbert": [
        f"distilbert.transformer.layer.{i}.{name}"
        for i in (0, 1)
        for name in (
            "attention.q_lin",
            "attention.k_lin",
            "attention.v_lin",
            "attention.out_lin",
            "ffn.lin1",
            "ffn.lin2",
        )
    ],
    "roberta": [f"roberta.encoder.layer.{i}.{n}" for i in (0, 1) for n in BERT_LAYER],
    "albert": [
        f"albert.encoder.albert_layer_groups.0.albert_layers.0.{name}"
        for name in (
            "attention.query",
            "attention.key",
            "attention.value",
            "attention.dense",
            "ffn",
            "ffn_output",
        )
    ],
    "deberta-v2": [
        f"deberta.encoder.layer.{i}.{name}"
        for i in (0, 1)
        for name in (
            "attention.self.query_proj",
            "attention.self.key_proj",
            "attention.self.value_proj",
            *BERT_LAYER[3:],
        )
    ],
}


def test_head_is_the_output_layers(family: str, backbone: Backbone) -> None:
    expected = [f"{m}.{part}" for m in HEADS[family] for part in ("weight", "bias")]
    assert list(backbone.head) == expected


def test_targets_are_the_linear_layers_of_the_blocks(
    family: str, backbone: Backbone
) -> None:
    assert set(backbone.targets) == set(TARGETS[family])
    shapes = {tuple(m.weight.shape) for m in backbone.targets.values()}
    assert shapes == {(32, 32), (48, 32), (32, 48)}


def test_head_is_fresh_and_seeded(folder: Path) -> None:
    model = ModelConfig(name=str(folder))
    one, same, other = (load_backbone(model, 3, seed) for seed in (3, 3, 4))
    for name, parameter in one.head.items():
        assert torch.equal(parameter, same.head[name])
        assert parameter.ndim == 1 or not torch.equal(parameter, other.head[name])
    assert one.digest == other.digest


def test_what_the_checkpoint_lacks_is_head(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    config = BertConfig.from_pretrained(tiny_models["bert"])
    save_checkpoint(BertModel(config, add_pooling_layer=False), tmp_path)
    assert set(load_tiny(tmp_path).head) == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }


def test_head_of_another_task_is_replaced(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    config = BertConfig.from_pretrained(tiny_models["bert"], num_labels=7)
    save_checkpoint(BertForSequenceClassification(config), tmp_path)
    head = load_tiny(tmp_path).head
    assert {name: tuple(p.shape) for name, p in head.items()} == {
        "classifier.weight": (3, 32),
        "classifier.bias": (3,),
    }


@pytest.mark.parametrize(
    ("targets", "ends"),
    [
        ("query,value", ["attention.self.query", "attention.self.value"]),
        ("attention.output.dense", ["attention.output.dense"]),
        (" key , intermediate.dense", ["attention.self.key", "intermediate.dense"]),
    ],
)
def test_targets_by_the_end_of_their_name(
    tiny_models: dict[str, Path], targets: str, ends: list[str]
) -> None:
    backbone = load_tiny(tiny_models["bert"], targets)
    expected = {f"bert.encoder.layer.{i}.{end}" for i in (0, 1) for end in ends}
    assert set(backbone.targets) == expected


@pytest.mark.parametrize("targets", ["quer", "query,pooler", "classifier", "uery"])
def test_unknown_targets_are_refused(
    tiny_models: dict[str, Path], targets: str
) -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets is .*query") as error:
        load_tiny(tiny_models["bert"], targets)
    assert repr(targets.split(",")[-1]) in str(error.value)


@pytest.mark.parametrize("missing", ["all", "config", "weights", "tokenizer"])
def test_missing_model_is_a_config_error(tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "model"
    if missing in ("weights", "tokenizer"):
        make_body("bert").save_pretrained(folder)
    if missing in ("weights", "config"):
        make_tokenizer().save_pretrained(folder)
    if missing == "weights":
        (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.name is"):
        load_backbone(ModelConfig(name=str(folder)), 3, 0)


def test_unreachable_hub_model_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"model\.name is 'no-such/model'"):
        load_backbone(ModelConfig(name="no-such/model"), 3, 0)


def test_padding_does_not_reach_the_logits(
    backbone: Backbone, examples: Examples
) -> None:
    together = logits(backbone.model, examples)
    for row in (0, 7, 23):
        alone = logits(backbone.model, examples.select(np.array([row])))
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)


def test_real_checkpoint_has_its_targets(assets: Path) -> None:
    """MiniLM: 6 layers of 6 matrices; its pooler is in the checkpoint or is head."""
    folder = assets / "models" / "minilm-l6-h384-uncased"
    backbone = load_backbone(ModelConfig(name=str(folder)), 20, 0)
    assert len(backbone.targets) == 36
    assert sum(m.weight.numel() for m in backbone.targets.values()) == 6 * 12 * 384**2
    assert backbone.head["classifier.weight"].shape == (20, 384)
