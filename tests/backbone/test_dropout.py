"""Dropout from 16 bits an entry: shares, scale, gradients and the generator."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from slora_flwr.backbone.dropout import Dropout, draw_kept, replace_dropout


@pytest.mark.parametrize(
    ("p", "dropped"), [(0.1, 6554), (0.5, 32768), (1e-9, 1), (1 - 1e-9, 65535)]
)
def test_the_share_dropped(p: float, dropped: int) -> None:
    torch.manual_seed(3)
    kept, scale = draw_kept(torch.Size([1000, 1003]), p)
    assert kept.dtype == torch.uint8
    assert set(kept.unique().tolist()) <= {0, 1}
    assert scale == 65536 / (65536 - dropped)
    share, count = dropped / 65536, kept.numel()
    found = 1 - float(kept.double().mean())
    # Six standard deviations of a binomial share.
    assert abs(found - share) <= 6 * (share * (1 - share) / count) ** 0.5


def test_entries_do_not_depend_on_each_other() -> None:
    torch.manual_seed(4)
    kept, _ = draw_kept(torch.Size([250_000, 4]), 0.5)
    # The four lanes of a word, and neighbours within a lane.
    signs = 2 * kept.double() - 1
    found = (signs.T @ signs / len(signs)).fill_diagonal_(0)
    assert float(found.abs().max()) < 6 / len(signs) ** 0.5
    after = (signs[1:] * signs[:-1]).mean(dim=0)
    assert float(after.abs().max()) < 6 / len(signs) ** 0.5


def test_gradient_and_values() -> None:
    layer = Dropout(0.25)
    x = torch.randn(7, 9, requires_grad=True)
    torch.manual_seed(5)
    y = layer(x)
    y.backward(torch.full_like(y, 3.0))
    torch.manual_seed(5)
    kept, scale = draw_kept(x.shape, 0.25)
    assert scale == 4 / 3
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(y, x * kept * scale)
    assert x.grad is not None
    assert torch.equal(x.grad, 3.0 * kept * scale)


def test_checkpointing_draws_the_same_entries_again() -> None:
    layer = Dropout(0.5)
    x = torch.randn(50, 50, requires_grad=True)
    torch.manual_seed(6)
    (plain,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.manual_seed(6)
    y = checkpoint(lambda given: layer(given).square(), x, use_reentrant=False)
    (again,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(again, plain)


def test_only_training_with_a_proper_share_is_replaced() -> None:
    model = nn.Sequential(nn.Dropout(0.3), nn.Dropout(0.0), nn.Dropout(1.0))
    replace_dropout(model)
    x = torch.randn(5, 5)
    assert [type(layer) for layer in model] == 3 * [Dropout]
    assert not torch.equal(model[0](x), x)
    assert torch.equal(model[1](x), x)
    assert not model[2](x).any()
    assert torch.equal(model.eval()(x), x)
