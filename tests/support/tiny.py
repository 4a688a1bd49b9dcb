"""Tiny random models with a tokenizer, and examples for them."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from slora_flwr.adapters import SparseAdapter
from slora_flwr.adapters.handoff import Handoff, prime_low_rank
from slora_flwr.backbone.load import Backbone, load_backbone
from slora_flwr.common.tensors import State
from slora_flwr.config import LoraConfig, ModelConfig
from slora_flwr.data.examples import Examples

FAMILIES = ("bert", "distilbert", "roberta", "albert", "deberta-v2")
VOCAB = 120
LABELS = 3
CLASSES = ["apples", "bridges", "clouds"]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def make_body(family: str) -> PreTrainedModel:
    """Return a random body; 32 and 48 features, so that not all layers are square."""
    # Larger weights than the usual 0.02, so that a wrong weight shows in the logits.
    shared: dict[str, Any] = {
        "vocab_size": VOCAB,
        "pad_token_id": 0,
        "max_position_embeddings": 40,
        "initializer_range": 0.2,
    }
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    if family == "bert":
        return BertModel(BertConfig(**shared, **sizes))
    if family == "distilbert":
        own: dict[str, Any] = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
        return DistilBertModel(DistilBertConfig(**shared, **own))
    if family == "roberta":
        return RobertaModel(RobertaConfig(**shared, **sizes))
    if family == "albert":
        return AlbertModel(AlbertConfig(**shared, **sizes, embedding_size=16))
    relative: dict[str, Any] = {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
    }
    return DebertaV2Model(DebertaV2Config(**shared, **sizes, **relative))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words: the special tokens, then w5, w6, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), VOCAB))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    pad, unk, cls, sep, mask = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        unk_token=unk,
        cls_token=cls,
        sep_token=sep,
        mask_token=mask,
    )


def save_checkpoint(model: PreTrainedModel, folder: Path) -> Path:
    """Save a checkpoint with the tiny tokenizer beside it."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@cache
def _loaded(folder: Path, targets: str) -> Backbone:
    return load_backbone(ModelConfig(name=str(folder)), LABELS, 3, targets)


def load_tiny(folder: Path, targets: str = "all-linear") -> Backbone:
    """Return a copy of a tiny backbone, which is loaded once since loading is slow."""
    return copy.deepcopy(_loaded(folder, targets))


def make_examples(count: int = 24, seed: int = 0) -> Examples:
    """Return random examples of unequal lengths; half of the tokens tell the label."""
    random = np.random.default_rng(seed)
    labels = random.integers(LABELS, size=count)
    lengths = random.integers(4, 17, size=count)
    tokens = []
    for label, length in zip(labels, lengths, strict=True):
        text = random.integers(len(SPECIAL), VOCAB, size=length)
        telling = random.random(length) < 0.5
        tokens.append(np.where(telling, len(SPECIAL) + label, text))
    return Examples(
        np.concatenate(tokens).astype(np.int32),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels.astype(np.int64),
        pad=0,
    )


def logits(model: nn.Module, examples: Examples) -> Tensor:
    """Return all examples' logits, computed in one batch without dropout."""
    device = next(model.parameters()).device
    ids, mask, _ = examples.batch(np.arange(len(examples)))
    with torch.no_grad():
        out = model.eval()(input_ids=ids.to(device), attention_mask=mask.to(device))
    result = out.logits
    assert isinstance(result, Tensor)
    return result.float().cpu()


def copy_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def perturb(state: dict[str, Tensor], scale: float, seed: int = 0) -> dict[str, Tensor]:
    """Return a state with noise added to every tensor."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + scale * torch.randn(tensor.shape, generator=generator)
        for name, tensor in state.items()
    }


def hand_over(
    backbone: Backbone, sparse: SparseAdapter, state: State, config: LoraConfig
) -> Handoff:
    """Return the handoff from a sparse phase with one mask, as in a run."""
    positions, values = sparse.learned(state, rounds=0)
    sparse.detach()
    head = {name: state[name] for name in backbone.head}
    return prime_low_rank(backbone, positions, values, head, config)


def loss_of(backbone: Backbone, examples: Examples) -> Tensor:
    """Return the mean cross-entropy over all examples, without dropout."""
    ids, mask, labels = examples.batch(np.arange(len(examples)))
    device = backbone.device
    out = backbone.model.eval()(
        input_ids=ids.to(device), attention_mask=mask.to(device)
    )
    return F.cross_entropy(out.logits, labels.to(device))


def shape_of(module: nn.Linear) -> tuple[int, int]:
    return module.out_features, module.in_features


def no_dropout(backbone: Backbone) -> Backbone:
    for module in backbone.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return backbone
