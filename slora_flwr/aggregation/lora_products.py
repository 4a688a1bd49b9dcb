"""Aggregators of LoRA's products B·A, which the mean factors do not reproduce.

With P the mean of the clients' products B_i·A_i, weighted by examples:

- `exact` (FedEx-LoRA, arXiv 2410.09432) averages the factors and adds the error of
  their product, P - B·A, to the base.
- `flexlora` (FlexLoRA, arXiv 2402.11505) takes the best factors of the given rank from
  the SVD of P. QR factors of the stacks give that SVD without the dense product
  (FLoRIST, arXiv 2506.09199).
"""

import torch
from torch.nn import functional as F  # noqa: N812

from slora_flwr.adapters.base import Adapter
from slora_flwr.adapters.priming import prime
from slora_flwr.aggregation.base import Aggregator, Step
from slora_flwr.aggregation.mean import Mean
from slora_flwr.aggregation.stack import Stack
from slora_flwr.common.svd import truncated_product
from slora_flwr.common.tensors import State

# Singular values of a residual below this share of the product's norm are float32
# rounding errors.
NEGLIGIBLE = 1e-7


def redistribute(stack: Stack, sent: State) -> State:
    """Return FlexLoRA's new factors: B·A is the best approximation of P of their rank.

    Both factors get the root of the singular values. Slices are in descending order of
    these, so a client of a smaller rank uses the first ones.

    Parameters
    ----------
    stack : Stack
        The round's updates.
    sent : State
        The state that the clients started from.
    """
    factors: State = {}
    for name, (left, right) in stack.products(sent).items():
        svd = truncated_product(left, right, len(sent[f"{name}.lora_A"]))
        a, b = prime(svd, 1.0, "balanced")
        factors[f"{name}.lora_A"], factors[f"{name}.lora_B"] = a, b
    return factors


def residual(stack: Stack, sent: State, after: State, scaling: float) -> State:
    """Return FedEx-LoRA's change of the base: s·(P - B·A).

    Parameters
    ----------
    stack : Stack
        The round's updates.
    sent, after : State
        The state that the clients started from, and the new one with the mean factors.
    scaling : float
        LoRA's s.

    Returns
    -------
    State
        `<module>.b` (out, k) and `<module>.a` (k, in), where b·a is the change. All
        matrices have the same k, the largest rank that is not negligible.
    """
    svds = {}
    rank = 0
    for name, (left, right) in stack.products(sent).items():
        # The norm of P, from the small Gram matrices of its factors.
        largest = float(((left.T @ left) * (right @ right.T)).sum()) ** 0.5
        a, b = after[f"{name}.lora_A"].double(), after[f"{name}.lora_B"].double()
        left, right = torch.cat([left, -b], dim=1), torch.cat([right, a])
        most = min(left.shape[0], right.shape[1], left.shape[1])
        svds[name] = svd = truncated_product(left, right, most)
        rank = max(rank, int((svd.s > NEGLIGIBLE * largest).sum()))
    change: State = {}
    for name, svd in svds.items():
        root = (svd.s[:rank] * scaling) ** 0.5
        b = torch.from_numpy(svd.u[:, :rank] * root).float()
        a = torch.from_numpy(root[:, None] * svd.vt[:rank]).float()
        # A smaller matrix has fewer singular values: zeros stand for the others.
        missing = rank - len(root)
        change[f"{name}.b"] = F.pad(b, (0, missing))
        change[f"{name}.a"] = F.pad(a, (0, 0, 0, missing))
    return change


class ExactProducts(Aggregator):
    """Average the factors and add their product's error to the base: FedEx-LoRA."""

    steps = False
    needs_factors = True
    changes_base = True
    needs_float32 = True
    fold = Stack

    def finish(
        self, fold: Mean, sent: State, step: Step, adapter: Adapter
    ) -> tuple[State, State | None]:
        """Return the state after a round, and s·(P - B·A); see `Aggregator.finish`."""
        state = step(fold.result())
        return state, residual(Stack.of(fold), sent, state, adapter.scaling)


class FactoredProducts(Aggregator):
    """Take the best factors of the mean product: FlexLoRA."""

    steps = False
    takes_ranks = True
    needs_factors = True
    renews = True
    fold = Stack

    def finish(
        self, fold: Mean, sent: State, step: Step, adapter: Adapter
    ) -> tuple[State, State | None]:
        """Return the state after a round, with new factors; the base stays."""
        return step(fold.result()) | redistribute(Stack.of(fold), sent), None
