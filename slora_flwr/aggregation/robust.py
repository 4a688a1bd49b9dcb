"""Robust aggregation: a minority of hostile clients has little influence.

- `median` and `trimmed-mean` (Yin et al., arXiv 1803.01498): for each entry, the
  clients' median, or their mean without the `byzantine` largest and smallest values.
- `krum` (Blanchard et al., arXiv 1703.02757): the update of the client with the least
  sum of squared distances to its n - byzantine - 2 nearest neighbours.
- `multi-krum`: the mean of the n - byzantine - 2 updates with the least such sums.

All clients have equal weight, since a hostile one could lie about its examples.

If clients train both LoRA factors, entries of the factors are not comparable between
clients, but the products B·A are. Median and trimmed mean then act on the entries of
the products, and the new factors are the best ones of their rank, as in FlexLoRA.
Krum's distances are those of s·B·A and of everything else that is trained. If all
clients share one factor (`ffa`, `alternate`), entries of the other are comparable.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from slora_flwr.adapters.base import Adapter
from slora_flwr.adapters.priming import prime
from slora_flwr.aggregation.base import Aggregator, Step
from slora_flwr.aggregation.mean import Mean
from slora_flwr.aggregation.stack import Stack
from slora_flwr.common.svd import truncated_dense
from slora_flwr.common.tensors import State
from slora_flwr.config import ServerConfig

# Number of a matrix's rows whose products are in memory at once, for all clients.
_ROWS = 64

Update = Mapping[str, Tensor]


def combine(
    stack: Stack, server: ServerConfig, sent: State, scaling: float
) -> tuple[State, State]:
    """Combine the clients' updates by a robust statistic.

    Parameters
    ----------
    stack : Stack
        The round's updates.
    server : ServerConfig
        Server config with `robust` other than `none`.
    sent : State
        The state that the clients started from.
    scaling : float
        LoRA's s; unused if there are no factors.

    Returns
    -------
    update : State
        The update that replaces the mean.
    factors : State
        New factors, for the names that `update` omits.
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
        svd = truncated_dense(product, a.shape[1])
        factors[f"{name}.lora_A"], factors[f"{name}.lora_B"] = prime(
            svd, 1.0, "balanced"
        )
    rest = [name for name in updates[0] if name not in factors]
    return {n: trimmed_mean(_stack(updates, n), cut).float() for n in rest}, factors


def trimmed_mean(values: Tensor, cut: int) -> Tensor:
    """Compute the mean over clients without the `cut` largest and smallest values.

    Parameters
    ----------
    values : Tensor
        Shape (clients, ...).
    cut : int
        Less than half of the clients; the largest such number gives the median.
    """
    return values.sort(dim=0).values[cut : len(values) - cut].mean(dim=0)


def krum_scores(gram: Tensor, byzantine: int) -> Tensor:
    """Compute Krum's score of each client, the lower the better.

    Parameters
    ----------
    gram : Tensor
        Inner products of the clients' updates, float64, shape (n, n).
    byzantine : int
        Number of clients that may be hostile.
    """
    squares = gram.diagonal()
    distances = (squares[:, None] + squares[None, :] - 2 * gram).clamp(min=0)
    distances.fill_diagonal_(torch.inf)
    return distances.sort(dim=1).values[:, : len(gram) - byzantine - 2].sum(dim=1)


def _gram(
    updates: Sequence[Update], pairs: Sequence[str], sent: State, scaling: float
) -> Tensor:
    """Compute the inner products of the clients' changes of the weights."""
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
    """A robust statistic, in place of a method's own mean."""

    fold = Stack

    def finish(
        self, fold: Mean, sent: State, step: Step, adapter: Adapter
    ) -> tuple[State, State | None]:
        """Return the state after a round, and the round's change of the base."""
        update, factors = combine(
            Stack.of(fold), self.config.server, sent, adapter.scaling
        )
        state = step(update) | factors
        changes = self.phase.changes_base
        return state, adapter.base_change(state) if changes else None
