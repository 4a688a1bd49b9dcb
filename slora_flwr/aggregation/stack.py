"""The stack of clients' updates, for aggregators that need more than the mean."""

from collections.abc import Callable, Mapping
from typing import Self

import torch
from flwr.app import Array
from torch import Tensor

from slora_flwr.aggregation.mean import PLAIN, Mean
from slora_flwr.common.tensors import State
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.state_channel import cut, write_updates


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
        """Return a node's reply: its clients' encoded updates, in order of arrival."""
        arrays = self._arrays
        if self._codec.is_exact:  # and so keeps no arrays
            updates = [update for _, update in self._updates.values()]
            ranks = self._ranks(self._updates)
            both = zip(updates, ranks, strict=True)
            arrays = [self._codec.encode(cut(update, rank)) for update, rank in both]
        return write_updates(arrays)

    def _join(self, node: Self) -> None:
        super()._join(node)
        self._updates |= node._updates

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
