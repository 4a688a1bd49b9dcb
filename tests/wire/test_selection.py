"""Which values of an update travel."""

import math

import torch

from slora_flwr.wire.codec import Codec
from slora_flwr.wire.selection import choose, weigh_by_product


def test_the_product_rule_by_hand() -> None:
    """|dB_ij| times the norm of A's row j; |dA_jk| times that of B's column j."""
    changes = {
        "m.lora_A": torch.tensor([[0.0, 4.0, -3.0], [0.0, 0.0, 0.5]]),
        "m.lora_B": torch.tensor([[0.0, -1.0], [1.0, 0.0]]),
        "head": torch.tensor([-0.25, 0.5]),
    }
    factors = {
        "m.lora_A": torch.tensor([[3.0, 4.0, 0.0], [0.0, 1.0, 0.5]]),
        "m.lora_B": torch.tensor([[5.0, -1.0], [12.0, 2.0]]),
    }
    # A's rows have norms 5 and root 1.25, B's columns 13 and root 5.
    weights = weigh_by_product(changes, factors)
    a = torch.tensor([[0.0, 52.0, 39.0], [0.0, 0.0, 0.5 * math.sqrt(5)]])
    b = torch.tensor([[0.0, math.sqrt(1.25)], [5.0, 0.0]])
    torch.testing.assert_close(weights["m.lora_A"], a)
    torch.testing.assert_close(weights["m.lora_B"], b)
    assert weights["head"].tolist() == [0.25, 0.5]


def test_the_product_rule_with_a_factor_that_rests() -> None:
    factors = {"m.lora_A": torch.tensor([[3.0, 4.0]]), "m.lora_B": torch.zeros(2, 1)}
    weights = weigh_by_product({"m.lora_B": torch.tensor([[1.0], [-2.0]])}, factors)
    assert weights["m.lora_B"].tolist() == [[5.0], [10.0]]


def test_the_largest_are_chosen_of_adapter_and_head() -> None:
    weights = {
        "a": torch.tensor([[1.0, 9.0], [3.0, 2.0]]),
        "b": torch.tensor([7.0, 0.0]),
        "head": torch.tensor([100.0, 200.0, 50.0]),
    }
    # A third of six is 2: the 9 and the 7; of the head's three, 1.
    assert Codec(share=1 / 3, head=3).parts(9) == [2, 1]
    assert choose(weights, [2, 1], head=3).tolist() == [1, 4, 7]
    assert choose(weights, [1, 0], head=3).tolist() == [1]
    assert choose({"b": weights["b"]}, [1, 0], head=0).tolist() == [0]
