"""Models in GGUF files: their weights, tokenizer and checks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from slora_flwr.backbone.load import load_backbone, load_tokenizer, public_name
from slora_flwr.config import ConfigError, ModelConfig
from slora_flwr.tasks.causal_lm import CausalLM
from tests.support.causal import make_language_model
from tests.support.tiny import VOCAB

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
# Names of llama.cpp, and transformers' own.
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
TEXT = "w1 w2 w3"


def make_vocabulary() -> dict[str, Any]:
    """Return the model of a byte-level BPE tokenizer of `VOCAB` entries at most."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([f"w{i} w{i}" for i in range(30)], trainer)
    found: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return found


def permuted(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Return a query or key matrix in llama.cpp's order of rows."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(3)
    return make_language_model("llama")


@pytest.fixture
def file(tmp_path: Path, model: Any) -> Path:
    """A small Llama as llama.cpp's converter writes it, unquantised."""
    gguf = pytest.importorskip("gguf", reason="needs the package gguf")
    path = tmp_path / "tiny.gguf"
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(VOCAB)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    vocabulary = make_vocabulary()
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].__getitem__)
    tokens += [f"<{i}>" for i in range(len(tokens), VOCAB)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (VOCAB - 3))
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)

    def add(name: str, own: str, heads: int = 0) -> None:
        weight = state[f"{own}.weight"].numpy()
        writer.add_tensor(name, permuted(weight, heads) if heads else weight)

    add("token_embd.weight", "model.embed_tokens")
    add("output_norm.weight", "model.norm")
    add("output.weight", "lm_head")
    heads = {
        "attn_q": config.num_attention_heads,
        "attn_k": config.num_key_value_heads,
    }
    for block in range(config.num_hidden_layers):
        for name, own in NAMES.items():
            place = f"model.layers.{block}.{own}"
            add(f"blk.{block}.{name}.weight", place, heads.get(name, 0))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_the_model_it_was_made_of(file: Path, model: Any) -> None:
    config = ModelConfig(name=str(file))
    backbone = load_backbone(config, None, seed=0, task=CausalLM())
    assert backbone.tokenizer.chat_template == TEMPLATE
    ids = torch.tensor([backbone.tokenizer(TEXT)["input_ids"]])
    assert ids.shape[1] > 1
    with torch.no_grad():
        found, expected = backbone.model(ids).logits, model(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert public_name(config.name) == "./tiny"
    # An ordinary model: its weights may be cast, and it may be saved.
    assert not hasattr(backbone.model.config, "quantization_config")
    backbone.model.save_pretrained(file.parent / "saved")


def test_a_gguf_file_can_be_a_classifiers_body(file: Path, model: Any) -> None:
    backbone = load_backbone(ModelConfig(name=str(file)), 3, seed=0)
    assert list(backbone.head) == ["score.weight"]
    embeddings = backbone.model.get_input_embeddings().weight
    assert torch.equal(embeddings, model.get_input_embeddings().weight)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the package gguf")
    path = tmp_path / "text.gguf"
    path.write_text("hello")
    with pytest.raises(ConfigError, match=r"model\.name is '.*text\.gguf'"):
        load_tokenizer(ModelConfig(name=str(path)))


def test_the_absent_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not there
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"tiny\.gguf'.* package gguf.*pip install"):
        load_backbone(ModelConfig(name=str(path)), None, seed=0, task=CausalLM())


def test_the_script_makes_a_folder_for_stock_transformers(
    file: Path, model: Any
) -> None:
    folder = file.parent / "folder"
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-m", "tools.gguf_folder", str(file), str(folder)],
        cwd=root,
        check=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    made = AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], weight, rtol=0, atol=0)
