"""The joined product, against PEFT's own layer."""

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from slora_flwr.adapters.low_rank_product import join_products


def make_layer(bias: bool, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40, bias=bias))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"])
    wrapped: Any = peft.get_peft_model(model, config)
    layer = wrapped.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer.to(dtype)


def run(layer: Any, x: Tensor, bf16: bool = False) -> list[Tensor]:
    weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = layer(x)
    g = torch.arange(y.numel(), dtype=torch.float32).view(y.shape).cos()
    return [y, *torch.autograd.grad((y * g).sum(), [x, *weights])]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 24), (7, 24)])
def test_it_is_pefts_product(bias: bool, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    layer = make_layer(bias, torch.float64)
    expected = run(layer, x)
    join_products(layer)
    for found, right in zip(run(layer, x), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-13, atol=1e-13)


def test_bf16_of_autocast() -> None:
    x = torch.randn(3, 5, 24, requires_grad=True)
    layer = make_layer(True, torch.float32)
    expected = run(layer, x, bf16=True)
    join_products(layer)
    found = run(layer, x, bf16=True)
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    for one, right in zip(found, expected, strict=True):
        # bf16 has 8 bits; sums of three terms are rounded in another order.
        rough = 2**-7 * float(right.detach().abs().max())
        torch.testing.assert_close(one, right, rtol=0, atol=rough)


def test_frozen_rows_and_columns_take_part() -> None:
    x = torch.randn(3, 5, 24, dtype=torch.float64, requires_grad=True)
    layer = make_layer(True, torch.float64)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    base, s = layer.base_layer, layer.scaling["default"]
    a_0, b_0 = torch.randn(4, 24).double(), torch.randn(40, 4).double()
    join_products(layer, a_0, b_0)
    found = run(layer, x)
    y = base(x) + s * (x @ a.T @ b.T + x @ a_0.T @ b_0.T)
    g = torch.arange(y.numel(), dtype=torch.float32).view(y.shape).cos()
    expected = [y, *torch.autograd.grad((y * g).sum(), [x, a, b])]
    for one, right in zip(found, expected, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-12, atol=1e-12)


def test_a_factor_with_a_hook_is_called() -> None:
    layer = make_layer(True, torch.float64)
    join_products(layer)
    seen: list[Tensor] = []
    layer.lora_A["default"].register_forward_hook(lambda m, x, y: seen.append(y))
    run(layer, torch.randn(2, 24, dtype=torch.float64, requires_grad=True))
    assert len(seen) == 1


def test_the_output_can_be_changed_in_place() -> None:
    """As DeBERTa changes its queries, through a view."""
    x = torch.randn(3, 5, 24, dtype=torch.float64, requires_grad=True)
    layer = make_layer(True, torch.float64)
    (expected,) = torch.autograd.grad((layer(x).transpose(0, 1) / 3).sum(), x)
    join_products(layer)
    y = layer(x).transpose(0, 1)
    y /= 3
    (found,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
