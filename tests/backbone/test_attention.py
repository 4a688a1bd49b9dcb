"""Attention with dropout, against PyTorch's own operations."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slora_flwr.backbone.attention import NAME, attend
from slora_flwr.backbone.dropout import draw_kept
from slora_flwr.backbone.load import Backbone
from tests.support.tiny import load_tiny

SHAPE = (2, 3, 5, 4)


def make_heads(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, *SHAPE, generator=stream)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def reference(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, p: float, scaling: float
) -> Tensor:
    """Attend as the formula says, in float64, by autograd's own rules."""
    q, k, v = q.double(), k.double(), v.double()
    scores = scaling * q @ k.transpose(-1, -2)
    shares = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    kept, scale = draw_kept(shares.shape, p)
    return (shares * kept * scale @ v).transpose(1, 2)


MASKS: dict[str, tuple[Tensor | None, bool, Tensor]] = {
    "all": (None, False, torch.ones(5, 5, dtype=torch.bool)),
    "causal": (None, True, torch.ones(5, 5, dtype=torch.bool).tril()),
    "padded": (
        torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()[:, None, None],
        False,
        torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()[:, None, None],
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_values_and_gradients(name: str) -> None:
    mask, is_causal, seen = MASKS[name]
    g = torch.randn(2, 5, 3, 4)
    heads = make_heads()
    torch.manual_seed(7)
    y, none = attend(
        nn.Identity(), *heads, mask, dropout=0.3, scaling=0.4, is_causal=is_causal
    )
    assert none is None
    found = torch.autograd.grad(y, heads, g)
    torch.manual_seed(7)
    expected = reference(*heads, seen, 0.3, 0.4)
    gradients = torch.autograd.grad(expected, heads, g.double())
    torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-6)
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_without_dropout_it_is_pytorchs_own() -> None:
    q, k, v = make_heads()
    y, _ = attend(nn.Identity(), q, k, v, None, dropout=0.0, is_causal=False)
    own = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    assert torch.equal(y, own)


def test_bf16_is_that_of_autocast() -> None:
    heads = make_heads()
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = attend(nn.Identity(), *heads, None, dropout=0.3, is_causal=False)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y.float().sum(), heads)
    assert all(g.dtype == torch.float32 and g.any() for g in gradients)


@pytest.fixture(scope="module")
def bert(tiny_models: Any) -> Backbone:
    return load_tiny(tiny_models["bert"])


def test_models_with_dropout_attend_so(bert: Backbone, tmp_path: Any) -> None:
    assert bert.model.config._attn_implementation == NAME
    bert.model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def test_capped_scores_are_not_attended_without_the_cap() -> None:
    heads = make_heads()
    with pytest.raises(ValueError, match="softcap"):
        attend(nn.Identity(), *heads, None, dropout=0.3, is_causal=False, softcap=5.0)
