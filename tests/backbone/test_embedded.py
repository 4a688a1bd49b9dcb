"""The embedded models: that they are those whose figures the docs have."""

import pytest
import torch
from transformers import AutoTokenizer

import slora_embedded
from slora_flwr.backbone.load import load_backbone
from slora_flwr.config import ModelConfig


@pytest.mark.parametrize(
    ("name", "outputs", "digest", "size"),
    [
        ("embedded", 1, "baeb6a815c467f7661915c815f342db4", 1_494_784),
        ("embedded-llama", None, "fc46067863b02a00f714d06db28aa0fe", 2_361_024),
    ],
)
def test_an_embedded_model_is_the_one_whose_figures_the_docs_have(
    name: str, outputs: int | None, digest: str, size: int
) -> None:
    backbone = load_backbone(ModelConfig(name=name), outputs, seed=0)
    assert backbone.digest == digest
    assert backbone.size - backbone.head_size == size
    assert {p.dtype for p in backbone.model.parameters()} == {torch.float32}
    files = [p for p in slora_embedded.folder(name).iterdir() if p.is_file()]
    assert sum(path.stat().st_size for path in files) < 6_000_000


def test_the_embedded_language_model_completes_text() -> None:
    folder = slora_embedded.folder("embedded-llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def f(self, key=None):\n    return self._cache[key]  # 3.14 \u00e9"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    model = load_backbone(ModelConfig(name="embedded-llama"), None, seed=0).model
    given = tokenizer("    def __init__(", return_tensors="pt")["input_ids"]
    said: torch.Tensor = model.generate(
        input_ids=given, max_new_tokens=2, do_sample=False
    )
    (added,) = tokenizer.batch_decode(said[:, given.shape[1] :])
    assert added.startswith("self")
