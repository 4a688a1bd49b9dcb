"""Tiny random causal language models, and dialogues for them."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.support.runs import Config
from tests.support.tiny import SPECIAL, VOCAB, make_tokenizer

CATEGORIES = ["north", "south", "west"]
LANGUAGE_MODELS = ("llama", "gemma", "gpt2")
_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    # Larger weights than the usual 0.02, so that a wrong weight shows in the logits.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_SIZES: dict[str, Any] = {
    "max_position_embeddings": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_GROUPED: dict[str, Any] = {**_SIZES, "num_key_value_heads": 2}
_EXPERTS: dict[str, Any] = {
    **_GROUPED,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
# Families by name: transformers' type, and its sizes. Most group queries, half of them
# tie embeddings, GPT-2 transposes its layers, OPT projects its embeddings.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 8}),
    "qwen2": ("qwen2", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 8}),
    "gemma2": (
        "gemma2",
        {
            **_GROUPED,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 8,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma": (
        "gemma3_text",
        {
            **_GROUPED,
            "head_dim": 8,
            "sliding_window": 8,
            "final_logit_softcapping": 5.0,
        },
    ),
    "phi": ("phi", _GROUPED),
    "phi3": ("phi3", _GROUPED),
    "smollm3": ("smollm3", _GROUPED),
    "gpt2": (
        "gpt2",
        {"n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48},
    ),
    "opt": (
        "opt",
        {
            "max_position_embeddings": 40,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 16,
            "init_std": 0.2,
        },
    ),
    "gpt-neox": ("gpt_neox", _SIZES),
    "cohere": ("cohere", {**_GROUPED, "logit_scale": 0.25}),
    "granite": ("granite", {**_GROUPED, "logits_scaling": 0.5}),
    # Mixtures of experts, whose weights are arrays or, with DBRX, long matrices.
    "mixtral": ("mixtral", {**_GROUPED, "num_local_experts": 4}),
    "qwen2-moe": ("qwen2_moe", {**_EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3-moe": ("qwen3_moe", {**_EXPERTS, "head_dim": 8}),
    "jetmoe": ("jetmoe", {**_GROUPED, "num_local_experts": 4}),
}
# Those that transformers has no classifier of.
WITHOUT_CLASSIFIER = ("cohere", "granite", "jetmoe")
# Mixtures of experts, each with what is trained beside the experts.
MIXTURES = {
    "mixtral": "q_proj,v_proj",
    "qwen2-moe": "q_proj,v_proj",
    "qwen3-moe": "q_proj,v_proj",
    "jetmoe": "kv_proj",
}


def make_language_model(family: str, **changes: Any) -> PreTrainedModel:
    """Return a tiny random model of a family."""
    kind, sizes = FAMILIES[family]
    config = AutoConfig.for_model(kind, **{**_SHARED, **sizes, **changes})
    model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, PreTrainedModel)
    return model


def save_language_model(family: str, folder: Path, **changes: Any) -> Path:
    """Save a random model with the tiny tokenizer, which ends texts with [SEP]."""
    model = make_language_model(family, **changes)
    model.save_pretrained(folder)
    return save_outline(model.config, folder)


def save_outline(described: PreTrainedConfig, folder: Path) -> Path:
    """Save a model's config and the tiny tokenizer, without weights."""
    described.save_pretrained(folder)
    # For Qwen2, transformers makes a tokenizer of byte pairs of any vocabulary.
    is_qwen2 = described.model_type == "qwen2"
    tokenizer = _of_characters() if is_qwen2 else make_tokenizer()
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    return folder


def _of_characters() -> PreTrainedTokenizerFast:
    """Return a tokenizer of byte pairs that has no pairs."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *"w0123456789\u0120"])}
    model = models.BPE(vocabulary, [], unk_token=SPECIAL[1])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), pad_token=SPECIAL[0], unk_token=SPECIAL[1]
    )


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


def causal_keys(model: Path, dialogues: Path) -> Config:
    """Return what makes a run one of a language model; its clients share categories."""
    return {
        "task": "causal-lm",
        "model.name": str(model),
        "data.name": str(dialogues),
        "data.text": "prompt,input",
        "data.response": "response",
        "data.max-length": 24,
        "clients.by": "category",
        "clients.partitioner": "dirichlet",
        "clients.alpha": 1.0,
        "train.batch-size": 4,
    }
