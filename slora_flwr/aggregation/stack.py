"""The stack of clients' updates, for aggregators that need more than the mean."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from flwr.app import Array
from torch import Tensor

from slora_flwr.adapters.low_rank import fill_slices
from slora_flwr.aggregation.mean import PLAIN, Mean
from slora_flwr.common.tensors import State
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.state_channel import read_updates, write_updates


class Stack(Mean):
    """The mean, together with each client's update.

    Its size grows with the cohort. A node sends all of its clients' updates.
    """

    needs_each = True

    def __init__(
        self,
        rank_of: Callable[[int], int] | None = None,
        codec: Codec = PLAIN,
        clip_norm: float = 0.0,
    ) -> None:
        super().__init__(rank_of, codec, clip_norm)
        self._updates: dict[int, tuple[int, Mapping[str, Tensor]]] = {}

    def add(self, update: Mapping[str, Tensor], weight: int, client: int = 0) -> None:
        """Add one client's update; see `Mean.add`."""
        super().add(update, weight, client)
        self._updates[client] = (weight, update)

    def packed(self) -> Array:
        """Return a node's reply: its clients' updates, float32, in order of arrival."""
        updates = [update for _, update in self._updates.values()]
        return write_updates(updates, self._ranks(self._updates))

    def take(
        self,
        array: Array,
        shapes: Mapping[str, Sequence[int]],
        clients: Sequence[int],
        weights: Sequence[int],
    ) -> None:
        """Add a node's reply; see `Mean.take`."""
        if len(clients) == 1:
            super().take(array, shapes, clients, weights)
            return
        updates = read_updates(array, shapes, self._ranks(clients))
        node = Stack(self._rank_of)
        node.limit = self.limit
        for client, weight, update in zip(clients, weights, updates, strict=True):
            self._check_norm(update, 1)
            node.add(fill_slices(update, shapes), weight, client)
        self.merge(node.sums, node.weight)
        # Updates that cancel out in the mean do not in products of factors.
        self.sizes[-1] = max(node.sizes)
        self._updates |= node._updates
        for rank, weight in node._weights.items():
            self._weights[rank] = self._weights.get(rank, 0) + weight

    def updates(self) -> list[Mapping[str, Tensor]]:
        """Return the clients' updates in the order of their ids."""
        return [update for _, (_, update) in sorted(self._updates.items())]

    def weights(self) -> list[int]:
        """Return the clients' weights in the order of `updates`."""
        return [weight for _, (weight, _) in sorted(self._updates.items())]

    def products(self, sent: State) -> dict[str, tuple[Tensor, Tensor]]:
        """Stack the clients' weighted factors, so that left @ right is P.

        Parameters
        ----------
        sent : State
            The state that the clients started from.

        Returns
        -------
        dict
            By target matrix, float64: left (out, K) and right (K, in), with K the sum
            of the clients' ranks, in the order of client ids.
        """
        found = {}
        for name in [n.removesuffix(".lora_A") for n in sent if n.endswith(".lora_A")]:
            start_a, start_b = sent[f"{name}.lora_A"], sent[f"{name}.lora_B"]
            left, right = [], []
            for client, (weight, update) in sorted(self._updates.items()):
                rank = self._rank_of(client) if self._rank_of else len(start_a)
                a = start_a.double() + update[f"{name}.lora_A"].double()
                b = start_b.double() + update[f"{name}.lora_B"].double()
                right.append(a[:rank])
                left.append(b[:, :rank] * (weight / self.weight))
            found[name] = torch.cat(left, dim=1), torch.cat(right)
        return found

    def _ranks(self, clients: Iterable[int]) -> list[int | None]:
        return [self._rank_of(c) if self._rank_of else None for c in clients]
