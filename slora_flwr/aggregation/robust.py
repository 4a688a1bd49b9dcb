"""Robust aggregation: what a minority of hostile clients sends moves little.

- `median` and `trimmed-mean` (Yin et al., arXiv 1803.01498): of each entry the middle
  value of the clients', or the mean without the `byzantine` largest and smallest ones.
- `krum` (Blanchard et al., arXiv 1703.02757): the update of the client with the least
  sum of squared distances to the n - byzantine - 2 others that are nearest to it.
- `multi-krum`: the mean of the n - byzantine - 2 updates of least such sums.

All count clients alike, since a hostile one could lie about its examples.

Where clients train both of LoRA's factors, entries of one client's are not comparable
with another's, but the products B·A are. Median and trimmed mean are then of the
entries of the products, and the new factors the best ones of their rank, as FlexLoRA's
are; Krum's distances are those of s·B·A, and of all else that is trained. Where one
factor is common to all (`ffa`, `alternate`), entries of the other are comparable.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from slora_flwr.adapters.base import Adapter
from slora_flwr.adapters.priming import prime
from slora_flwr.aggregation.base import Aggregator, Step
from slora_flwr.aggregation.mean import Mean
from slora_flwr.aggregation.stack import Stack
from slora_flwr.common.svd import truncated_svd
from slora_flwr.common.tensors import State
from slora_flwr.config import ServerConfig

# Rows of a matrix whose products are in memory at once, for all clients.
_ROWS = 64

Update = Mapping[str, Tensor]


def combine(
    stack: Stack, server: ServerConfig, sent: State, scaling: float
) -> tuple[State, State]:
    """Combine the clients' updates.

    Parameters
    ----------
    stack : Stack
        The round's.
    server : ServerConfig
        With `robust` other than `none`.
    sent : State
        What the clients started from.
    scaling : float
        LoRA's s; of no meaning elsewhere.

    Returns
    -------
    update : State
        What stands for the mean update.
    factors : State
        New factors, for names that `update` leaves out.
    """
    updates = stack.updates()
    pairs = [n.removesuffix(".lora_A") for n in updates[0] if n.endswith(".lora_A")]
    pairs = [name for name in pairs if f"{name}.lora_B" in updates[0]]
    if server.robust in ("krum", "multi-krum"):
        kept = len(updates) - server.byzantine - 2 if server.robust != "krum" else 1
        scores = krum_scores(_gram(updates, pairs, sent, scaling), server.byzantine)
        order = scores.argsort(stable=True)[:kept].tolist()
        best = [updates[i] for i in order]
        return {n: _stack(best, n).mean(dim=0).float() for n in updates[0]}, {}
    cut = server.byzantine
    if server.robust == "median":
        cut = (len(updates) - 1) // 2
    factors: State = {}
    for name in pairs:
        a = sent[f"{name}.lora_A"].double() + _stack(updates, f"{name}.lora_A")
        b = sent[f"{name}.lora_B"].double() + _stack(updates, f"{name}.lora_B")
        parts = [trimmed_mean(part @ a, cut) for part in b.split(_ROWS, dim=1)]
        product = torch.cat(parts).numpy()
        at = np.arange(product.size)
        svd = truncated_svd(at, product.reshape(-1), product.shape, a.shape[1])
        factors[f"{name}.lora_A"], factors[f"{name}.lora_B"] = prime(
            svd, 1.0, "balanced"
        )
    rest = [name for name in updates[0] if name not in factors]
    return {n: trimmed_mean(_stack(updates, n), cut).float() for n in rest}, factors


def trimmed_mean(values: Tensor, cut: int) -> Tensor:
    """Take the mean over clients without the `cut` largest and smallest values.

    Parameters
    ----------
    values : Tensor
        Shape (clients, ...).
    cut : int
        Below half of the clients; the largest such gives the median.
    """
    return values.sort(dim=0).values[cut : len(values) - cut].mean(dim=0)


def krum_scores(gram: Tensor, byzantine: int) -> Tensor:
    """Give Krum's score of each client, the lower the better.

    Parameters
    ----------
    gram : Tensor
        Inner products of the clients' updates, float64, shape (n, n).
    byzantine : int
        How many clients may be hostile.
    """
    squares = gram.diagonal()
    distances = (squares[:, None] + squares[None, :] - 2 * gram).clamp(min=0)
    distances.fill_diagonal_(torch.inf)
    return distances.sort(dim=1).values[:, : len(gram) - byzantine - 2].sum(dim=1)


def _gram(
    updates: Sequence[Update], pairs: Sequence[str], sent: State, scaling: float
) -> Tensor:
    """Give the inner products of the clients' changes of the weights."""
    count = len(updates)
    gram = torch.zeros(count, count, dtype=torch.float64)
    factors = set()
    for name in pairs:
        factors |= {f"{name}.lora_A", f"{name}.lora_B"}
        a, b = sent[f"{name}.lora_A"].double(), sent[f"{name}.lora_B"].double()
        # A client's change of the product is [B_i, -B] · [A_i; A].
        own_a, own_b = (_stack(updates, f"{name}.lora_{x}") for x in "AB")
        left = torch.cat([b + own_b, -b.expand_as(own_b)], dim=2)
        right = torch.cat([a + own_a, a.expand_as(own_a)], dim=1)
        left, right = left.transpose(0, 1).flatten(1), right.flatten(0, 1)
        inner = (left.T @ left) * (right @ right.T)
        blocks = inner.view(count, 2 * len(a), count, 2 * len(a))
        gram += scaling**2 * blocks.sum(dim=(1, 3))
    for name in updates[0]:
        if name not in factors:
            flat = _stack(updates, name).flatten(1)
            gram += flat @ flat.T
    return gram


def _stack(updates: Sequence[Update], name: str) -> Tensor:
    return torch.stack([update[name].double() for update in updates])


class RobustAggregator(Aggregator):
    """A robust statistic in place of another aggregator's mean."""

    fold = Stack

    def finish(
        self, fold: Mean, sent: State, step: Step, adapter: Adapter
    ) -> tuple[State, State | None]:
        """Return the state after a round, and what it changes of the base."""
        update, factors = combine(
            Stack.of(fold), self.config.server, sent, adapter.scaling
        )
        state = step(update) | factors
        changes = self.phase.changes_base
        return state, adapter.base_change(state) if changes else None
