"""The last block of classifiers that read its first token."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from slora_flwr.backbone.first_token import cut_last_block
from tests.support.tiny import VOCAB

CUT = {"bert": True, "distilbert": True, "roberta": True}
CUT |= {"albert": False, "deberta-v2": True}


def load(folder: Path) -> Any:
    torch.manual_seed(2)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(5, VOCAB, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, 4:], mask[1, 4:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", CUT)
def test_logits_and_gradients_are_the_same(
    family: str, tiny_models: dict[str, Path]
) -> None:
    whole, cut = load(tiny_models[family]).eval(), load(tiny_models[family]).eval()
    assert cut_last_block(cut, pad=0) == CUT[family]
    found = []
    for model in (whole, cut):
        logits = model(**batch()).logits
        logits.square().sum().backward()
        found.append((logits, {n: p.grad for n, p in model.named_parameters()}))
    (logits, gradients), (others, cut_gradients) = found
    torch.testing.assert_close(others, logits, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            cut_gradients[name], gradient, rtol=1e-3, atol=1e-4, msg=name
        )


@pytest.mark.parametrize("family", CUT)
def test_what_the_last_block_computes(
    family: str, tiny_models: dict[str, Path]
) -> None:
    model = load(tiny_models[family]).eval()
    cut_last_block(model, pad=0)
    rows: dict[str, int] = {}
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda m, given, y, name=name: (
                    rows.update({name: given[0].shape[1]})
                    if given[0].ndim == 3
                    else None
                )
            )
    model(**batch())
    expected = 3 if CUT[family] else 0
    # The output of attention and the two layers after it.
    assert list(rows.values()).count(1) == expected


def test_a_classifier_that_reads_other_tokens_is_left_alone(
    tiny_models: dict[str, Path],
) -> None:
    model = load(tiny_models["bert"])
    pooler = model.bert.pooler
    pooler.forward = lambda hidden: torch.tanh(pooler.dense(hidden.mean(dim=1)))
    assert not cut_last_block(model, pad=0)
    hooks = [m._forward_pre_hooks for m in model.modules()]
    assert not any(hooks)
