"""The running average of states, against averages worked out by hand."""

import numpy as np
import pytest
import torch

from slora_flwr.aggregation.averaged_state import AveragedState, mix
from slora_flwr.common.tensors import State


def average(
    states: list[State], rule: str = "growing", decay: float = 0.8
) -> AveragedState:
    averaged = AveragedState(rule, decay)
    for state in states:
        averaged.add(state, {})
    return averaged


def numbers(*values: float) -> list[State]:
    return [{"head": torch.tensor([value])} for value in values]


# States weigh as the triangular numbers, 1, 3, 6, 10.
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([7.0], 7.0),
        ([7.0, 2.0], (7 + 3 * 2) / 4),
        ([7.0, 2.0, -3.0, 5.0], (7 + 3 * 2 - 6 * 3 + 10 * 5) / 20),
    ],
)
def test_the_growing_average(values: list[float], expected: float) -> None:
    found = average(numbers(*values)).state["head"]
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_the_exponential_average_begins_as_a_mean() -> None:
    """With decay 0.75: the mean of the first four, then a quarter of each new one."""
    states = numbers(4.0, 8.0, 0.0, 20.0, 16.0)
    found = [average(states[:n], "ema", 0.75).state["head"].item() for n in range(1, 6)]
    expected = [4.0, 6.0, 4.0, 8.0, 0.75 * 8.0 + 0.25 * 16.0]
    assert found == pytest.approx(expected, rel=1e-6)


def test_an_average_goes_on_from_one_that_a_phase_starts_with() -> None:
    """A state that stands for two weighs 1 + 3, the next ones 6 and 10."""
    averaged = AveragedState("growing", 0.8)
    averaged.begin({"head": torch.tensor([6.0])}, {"layer": torch.ones(1)}, 2)
    for value in (8.0, -1.0):
        tensor = torch.tensor([value])
        averaged.add({"head": tensor}, {"layer": tensor})
    expected = (4 * 6 + 6 * 8 - 10 * 1) / 20
    assert averaged.state["head"].item() == pytest.approx(expected, rel=1e-6)
    expected = (4 * 1 + 6 * 8 - 10 * 1) / 20
    assert averaged.weights["layer"].item() == pytest.approx(expected, rel=1e-6)


def test_without_an_average_it_is_the_last_state() -> None:
    states = numbers(4.0, 8.0)
    assert average(states, "none").state is states[-1]


def factors(a: torch.Tensor, b: torch.Tensor) -> State:
    return {"layer.lora_A": a, "layer.lora_B": b, "head": torch.zeros(2)}


def product(state: State) -> torch.Tensor:
    return state["layer.lora_B"].double() @ state["layer.lora_A"].double()


def test_products_are_averaged_where_factors_cancel() -> None:
    """(-B)(-A) = BA, while the mean of A and -A is zero."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 5), torch.randn(3, 2)
    mixed = mix(factors(a, b), factors(-a, -b), 0.5)
    torch.testing.assert_close(product(mixed), (b.double() @ a.double()))


def test_the_average_of_products_is_the_best_of_their_rank() -> None:
    torch.manual_seed(1)
    one = factors(torch.randn(2, 7), torch.randn(4, 2))
    other = factors(torch.randn(2, 7), torch.randn(4, 2))
    mixed = product(mix(one, other, 0.25)).numpy()
    dense = (0.75 * product(one) + 0.25 * product(other)).numpy()
    u, s, vt = np.linalg.svd(dense)
    np.testing.assert_allclose(mixed, (u[:, :2] * s[:2]) @ vt[:2], atol=1e-6)
    assert s[2] > 0.1  # so that the rank cuts something


def test_a_factor_alone_is_averaged_by_entry() -> None:
    one, other = torch.randn(3, 2), torch.randn(3, 2)
    mixed = mix({"layer.lora_B": one}, {"layer.lora_B": other}, 0.25)
    torch.testing.assert_close(mixed["layer.lora_B"], 0.75 * one + 0.25 * other)


def test_what_the_rank_cuts_off_goes_into_the_averaged_base() -> None:
    """Base and factors together are the exact mean of W + s·B·A, by weights 1, 3, 6."""
    torch.manual_seed(3)
    states = [factors(torch.randn(2, 7), torch.randn(4, 2)) for _ in range(3)]
    bases = [torch.randn(4, 7) for _ in states]
    averaged = AveragedState("growing", 0.8)
    for state, base in zip(states, bases, strict=True):
        averaged.add(state, {"layer": base}, scaling=0.5)
    found = averaged.weights["layer"] + 0.5 * product(averaged.state)
    expected = sum(
        share * (base + 0.5 * product(state)) / 10
        for share, state, base in zip((1, 3, 6), states, bases, strict=True)
    )
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_restored_average_goes_on_bit_for_bit(rounds: int) -> None:
    torch.manual_seed(2)
    states = [factors(torch.randn(2, 5), torch.randn(3, 2)) for _ in range(5)]
    bases = [{"layer": torch.randn(3, 5)} for _ in range(5)]
    whole, first, second = (AveragedState("growing", 0.8) for _ in range(3))
    for state, base in zip(states, bases, strict=True):
        whole.add(state, base)
    for state, base in zip(states[:rounds], bases[:rounds], strict=True):
        first.add(state, base)
    second.restore(first.snapshot(), states[rounds - 1])
    for state, base in zip(states[rounds:], bases[rounds:], strict=True):
        second.add(state, base)
    for found, expected in (
        (second.state, whole.state),
        (second.weights, whole.weights),
    ):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
