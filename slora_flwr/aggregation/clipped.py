"""The mean of clipped updates, to which differential privacy adds its noise."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from flwr.app import Array
from torch import Tensor

from slora_flwr.aggregation.base import Aggregator
from slora_flwr.aggregation.mean import PLAIN, SCALE, Mean
from slora_flwr.wire.clipping import clip
from slora_flwr.wire.codec import Codec


class ClippedMean(Mean):
    """The mean of updates clipped to a norm, over a fixed number of clients.

    All clients weigh one, since their numbers of examples are private, and the sum is
    divided by the clients expected, whoever answered (DP-FedAvg, arXiv 1710.06963).
    One client more or less moves the sum by `bound` at most.

    Parameters
    ----------
    bound : float
        Largest L2 norm of a client's update over all its values.
    expected : int
        Clients of a round, in expectation.
    codec : Codec
        How the update of a node's only client travels.
    """

    def __init__(self, bound: float, expected: int, codec: Codec = PLAIN) -> None:
        super().__init__(codec=codec)
        self._bound, self._clients = bound, expected

    def expect(self, weight: int) -> None:
        """Leave the range to all: clipped updates cannot fill it."""

    def add(self, update: Mapping[str, Tensor], weight: int, client: int = 0) -> None:
        """Add one client's update, as the server reads it; see `Mean.add`."""
        exact = clip({name: t.double() for name, t in update.items()}, self._bound)
        # Towards zero, so that rounding to the sums' grid lengthens nothing.
        held = {name: (t * SCALE).trunc() / SCALE for name, t in exact.items()}
        super().add(held, 1, client)

    def take(
        self,
        array: Array,
        shapes: Mapping[str, Sequence[int]],
        clients: Sequence[int],
        weights: Sequence[int],
    ) -> None:
        """Add what a node sent; see `Mean.take`."""
        super().take(array, shapes, clients, [1] * len(clients))

    def perturb(
        self,
        noise_multiplier: float,
        shapes: Mapping[str, Sequence[int]],
        generator: np.random.Generator,
    ) -> None:
        """Add Gaussian noise to the sum, whose standard deviation is in bounds.

        The sums are whole multiples of 1 / `SCALE`. With noise rounded to such they are
        what rounding would make of exact sums and exact noise, so that the last bits of
        floats give nothing away (Mironov, CCS 2012).

        Parameters
        ----------
        noise_multiplier : float
            Standard deviation over the bound.
        shapes : Mapping[str, Sequence[int]]
            The layout of an update; of nobody's too.
        generator : numpy.random.Generator
            Source of the noise.
        """
        std = noise_multiplier * self._bound * SCALE
        noise = {
            name: generator.normal(0.0, std, tuple(shape)).round()
            for name, shape in shapes.items()
        }
        self.merge({n: torch.from_numpy(t).long() for n, t in noise.items()}, 0)

    def _divisor(self, name: str, sums: Tensor) -> Tensor | int:
        return self._clients


class ClippedAggregator(Aggregator):
    """The mean of clipped updates in place of another aggregator's mean."""

    def make_fold(self) -> ClippedMean:
        """Return an empty fold that clips each client's update."""
        bound = self.config.privacy.bound(self.phase.adapter_type.section)
        return ClippedMean(bound, self.config.clients.per_round, self.codec)
