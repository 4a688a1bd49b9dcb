"""The weighted mean of updates, a fold whose order and grouping do not matter."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar, Self

import torch
from flwr.app import Array
from torch import Tensor

from slora_flwr.adapters.low_rank import fill_slices
from slora_flwr.wire.clipping import largest_norm, norm
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.integers import most_bytes
from slora_flwr.wire.packing import count_values, joined_size
from slora_flwr.wire.state_channel import (
    SUMS,
    Upload,
    read_sums,
    read_update,
    read_updates,
    write_sums,
    write_updates,
)

# Sums are whole multiples of 1 / SCALE. With weights of at least 1, that is finer than
# float32's resolution at an update of 1e-2, and it leaves room for sums up to 2^32.
SCALE = 2.0**30
LARGEST = 2**62
# Values that are converted at once, so that they stay in a core's cache.
_BLOCK = 2**15

PLAIN = Codec()


class FoldError(ValueError):
    """An update is not finite, or is too large to be summed exactly."""


class Mean:
    """The mean of updates weighted by examples: FedAvg (arXiv 1602.05629).

    A node folds its clients' updates into it, and the server its nodes' sums. Sums are
    whole numbers, which do not depend on order or grouping. The mean is therefore the
    same, bit for bit, however many nodes share a cohort and whichever answers first.

    Parameters
    ----------
    rank_of : Callable or None
        Each client's rank by id, if clients have LoRA factors of different ranks. A
        slice of the factors is then averaged over the clients that have it.
    codec : Codec
        Encoding of updates.
    clip_norm : float
        Bound on the norm of each client's update, 0 for none.

    Attributes
    ----------
    needs_each : bool
        Whether it keeps each client's update, and not their sum alone.
    sums : dict[str, Tensor]
        The sums so far, int64.
    weight : int
        The weight that they stand for.
    limit : float
        Limit on the magnitude of an update's values, or of the mean of several if only
        their sum is known.
    sizes : list[float]
        The largest magnitude in each reply that was added, in their order: that of the
        update, of the largest of several, or of the mean of a sum.
    """

    needs_each: ClassVar[bool] = False

    def __init__(
        self,
        rank_of: Callable[[int], int] | None = None,
        codec: Codec = PLAIN,
        clip_norm: float = 0.0,
    ) -> None:
        self.sums: dict[str, Tensor] = {}
        self.weight = 0
        self.limit = math.inf
        self.sizes: list[float] = []
        self._rank_of = rank_of
        self._codec = codec
        self._clip_norm = clip_norm
        self._expected = 0
        self._reach: dict[str, int] = {}  # bounds of the sums' magnitudes
        self._weights: dict[int, int] = {}  # by rank, if clients have ranks
        # Encoded updates, until their sums are sure to be smaller.
        self._arrays: list[Array] = []
        self._keeps_arrays = not codec.is_exact

    @classmethod
    def of(cls, fold: "Mean") -> Self:
        """Return the fold, typed as this class.

        Raises
        ------
        TypeError
            If the fold is of another class.
        """
        if not isinstance(fold, cls):
            raise TypeError(f"the fold is {type(fold).__name__}, not {cls.__name__}")
        return fold

    def expect(self, weight: int) -> None:
        """Set the total weight to expect, and so limit each part to its share.

        Without a limit, one node could exhaust the range of the sums and keep out those
        that answer later.
        """
        self._expected = weight

    def add(self, update: Mapping[str, Tensor], weight: int, client: int = 0) -> None:
        """Add one client's update.

        Parameters
        ----------
        update : Mapping[str, Tensor]
            The update, float32, with the same names and shapes each time.
        weight : int
            The client's number of examples, above 0.
        client : int
            The client's id.

        Raises
        ------
        FoldError
            If a value is not finite, or exceeds 2^32 when multiplied by the weight.
        """
        scale = weight * SCALE
        most = {}
        for name, tensor in update.items():
            largest = _largest(tensor) * scale
            if not largest < LARGEST:  # also if it is NaN
                raise _out_of_range(name)
            most[name] = round(largest)
        self._admit(most, weight, lambda name: _whole(update[name], scale))
        for name, tensor in update.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros(tensor.shape, dtype=torch.int64)
            sums = self.sums[name].view(-1).split(_BLOCK)
            blocks = tensor.reshape(-1).split(_BLOCK)
            for own, block in zip(sums, blocks, strict=True):
                own.add_(_whole(block, scale))
        self._count(client, weight)

    def add_upload(
        self, upload: Upload, weight: int, client: int = 0, loss: float = 0.0
    ) -> None:
        """Add one client's update as its node sends it; see `add`."""
        self.add(upload.update, weight, client)
        if self._keeps_arrays:
            self._arrays.append(upload.array)
            if not self.needs_each and self._array_bytes() > self._most_bytes():
                self._arrays, self._keeps_arrays = [], False

    def packed(self) -> Array:
        """Return the reply of a node with several clients.

        It is their sums, or their encoded updates if these are smaller: coarse codes of
        a few clients take fewer bits than exact sums of what they stand for.
        """
        sums = write_sums(self.sums, max(self._weights, default=None))
        if self._arrays and self._array_bytes() < len(sums.data):
            return write_updates(self._arrays)
        return sums

    def take(
        self,
        array: Array,
        shapes: Mapping[str, Sequence[int]],
        clients: Sequence[int],
        weights: Sequence[int],
    ) -> None:
        """Add a node's reply.

        Parameters
        ----------
        array : Array
            The result of `packed`, or the encoded update of the node's only client.
        shapes : Mapping[str, Sequence[int]]
            The layout of an update.
        clients, weights : Sequence[int]
            The ids of the node's clients, and the number of examples of each.

        Raises
        ------
        FoldError, PayloadError
            If the reply cannot be added; the fold is then unchanged.
        """
        ranks = self._ranks(clients)
        if len(clients) == 1:
            update = read_update(array, shapes, self._codec, ranks[0])
            self._check_norm(update, 1)
            self.add(fill_slices(update, shapes), weights[0], clients[0])
        elif array.stype == SUMS and not self.needs_each:
            rank = max(map(self._rank_of, clients)) if self._rank_of else None
            sums = read_sums(array, shapes, rank)
            self._check_norm(sums, sum(weights) * SCALE)
            self.merge(fill_slices(sums, shapes), sum(weights))
            for client, weight in zip(clients, weights, strict=True):
                self._count(client, weight)
        else:
            node = self._empty()
            node.limit = self.limit
            updates = read_updates(array, shapes, self._codec, ranks)
            for client, weight, update in zip(clients, weights, updates, strict=True):
                self._check_norm(update, 1)
                node.add(fill_slices(update, shapes), weight, client)
            self._join(node)

    def _empty(self) -> Self:
        """Return an empty fold like this one."""
        return type(self)(self._rank_of, self._codec, self._clip_norm)

    def _join(self, node: Self) -> None:
        """Add another fold, made of each of its clients' updates."""
        self.merge(node.sums, node.weight)
        # Updates that cancel out in the mean do not in products of factors.
        self.sizes[-1] = max(node.sizes)
        for rank, weight in node._weights.items():
            self._weights[rank] = self._weights.get(rank, 0) + weight

    def _ranks(self, clients: Iterable[int]) -> list[int | None]:
        return [self._rank_of(c) if self._rank_of else None for c in clients]

    def _array_bytes(self) -> int:
        return joined_size([len(array.data) for array in self._arrays])

    def _most_bytes(self) -> int:
        """Return the largest number of bytes of the sums."""
        return most_bytes(count_values({n: t.shape for n, t in self.sums.items()}))

    def merge(self, sums: Mapping[str, Tensor], weight: int) -> None:
        """Add another fold's sums, int64, and its weight.

        Raises
        ------
        FoldError
            If a sum leaves the range.
        """
        most = {name: int(_largest(tensor)) for name, tensor in sums.items()}
        self._admit(most, weight, sums.__getitem__)
        for name, tensor in sums.items():
            if name in self.sums:
                self.sums[name].add_(tensor)
            else:
                self.sums[name] = tensor.clone()

    def result(self) -> dict[str, Tensor]:
        """Return the mean so far, float32."""
        return {
            name: sums.double().div_(self._divisor(name, sums) * SCALE).float()
            for name, sums in self.sums.items()
        }

    def _admit(
        self, most: Mapping[str, int], weight: int, terms: Callable[[str], Tensor]
    ) -> None:
        """Check that terms can be added, and count their weight.

        Parameters
        ----------
        most : Mapping[str, int]
            The largest magnitude in each tensor of terms.
        weight : int
            The weight that they stand for.
        terms : Callable
            Returns a tensor of terms, int64, by name.

        Raises
        ------
        FoldError
            If terms exceed the share of their weight or the limit, or a sum would leave
            the range.
        """
        share = min(1.0, weight / self._expected) if self._expected else 1.0
        reach = {}
        for name, largest in most.items():
            if largest >= int(LARGEST * share):
                raise _out_of_range(name)
            reach[name] = self._reach.get(name, 0) + largest
            if reach[name] >= LARGEST:
                # The bound is too coarse. Two terms below 2^62 cannot overflow.
                reach[name] = int(_largest(self.sums[name] + terms(name)))
                if reach[name] >= LARGEST:
                    raise _out_of_range(name)
        if weight:  # noise has none
            size = max(most.values(), default=0) / (weight * SCALE)
            if size > self.limit:
                raise FoldError(
                    f"its largest value is {size:.4g}; allowed: up to {self.limit:.4g}"
                    ", far beyond what other updates of the phase hold"
                )
            self.sizes.append(size)
        self._reach, self.weight = reach, self.weight + weight

    def _check_norm(self, update: Mapping[str, Tensor], unit: float) -> None:
        if not self._clip_norm:
            return
        count = sum(tensor.numel() for tensor in update.values())
        most = largest_norm(self._clip_norm, self._codec.dtype, count)
        if (found := norm(update) / unit) > most:
            raise FoldError(
                f"its update has norm {found:.4g}; allowed: up to {most:.4g}, since "
                f"server.clip-norm is {self._clip_norm:g}"
            )

    def _count(self, client: int, weight: int) -> None:
        if self._rank_of is not None:
            rank = self._rank_of(client)
            self._weights[rank] = self._weights.get(rank, 0) + weight

    def _divisor(self, name: str, sums: Tensor) -> Tensor | int:
        """Return the divisor: for a factor, the weight of the clients per slice."""
        if self._rank_of is None or not name.endswith((".lora_A", ".lora_B")):
            return self.weight
        along = int(name.endswith(".lora_B"))
        slices = range(sums.shape[along])
        held = [sum(w for r, w in self._weights.items() if r > i) for i in slices]
        # The sum of a slice that no client has is zero.
        shape = (-1, 1) if along == 0 else (1, -1)
        return torch.tensor(held).clamp(min=1).view(shape)


def _largest(tensor: Tensor) -> float:
    """Return the largest magnitude in a tensor, NaN if it holds NaN; 0 if empty."""
    if not tensor.numel():
        return 0
    low, high = tensor.aminmax()
    return max(-low.item(), high.item())


def _whole(tensor: Tensor, scale: float) -> Tensor:
    """Return the nearest whole numbers to scaled values, int64."""
    return tensor.to(torch.float64, copy=True).mul_(scale).round_().long()


def _out_of_range(name: str) -> FoldError:
    return FoldError(f"the update of {name} is not finite or too large")
