"""Tiny random causal language models, and dialogues for them."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from tests.support.tiny import SPECIAL, VOCAB, make_tokenizer

CATEGORIES = ["north", "south", "west"]
LANGUAGE_MODELS = ("llama", "gemma", "gpt2")
_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make_language_model(family: str) -> PreTrainedModel:
    """Return a random model: grouped queries, tied embeddings, or Conv1D."""
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**_SHARED, **_SIZES))
    if family == "gemma":
        own: dict[str, Any] = {"head_dim": 8, "sliding_window": 8}
        own |= {"final_logit_softcapping": 5.0}
        return Gemma3ForCausalLM(Gemma3TextConfig(**_SHARED, **_SIZES, **own))
    sizes: dict[str, Any] = {
        "n_positions": 40,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 48,
    }
    return GPT2LMHeadModel(GPT2Config(**_SHARED, **sizes))


def save_language_model(family: str, folder: Path) -> Path:
    """Save a random model with the tiny tokenizer, which ends texts with [SEP]."""
    model = make_language_model(family)
    model.save_pretrained(folder)
    return save_outline(model.config, folder)


def save_outline(described: PreTrainedConfig, folder: Path) -> Path:
    """Save a model's config and the tiny tokenizer, without weights."""
    described.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    return folder


def write_dialogues(path: Path, count: int = 60) -> Path:
    """Write prompts whose responses follow from them: each word's next one."""
    random = np.random.default_rng(3)
    first = len(SPECIAL)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", "input", "response", "category"])
        for i in range(count):
            words = random.integers(first, VOCAB - 1, size=int(random.integers(2, 6)))
            rows.writerow(
                [
                    " ".join(f"w{word}" for word in words),
                    f"w{first}" if i % 2 else "",
                    " ".join(f"w{word + 1}" for word in words[:3]),
                    CATEGORIES[min(2, i % 4)],
                ]
            )
    return path
