"""The mean of clipped updates, to which differential privacy adds noise."""

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import torch
from flwr.app import Array
from torch import Tensor

from slora_flwr.aggregation.base import Aggregator
from slora_flwr.aggregation.mean import PLAIN, SCALE, FoldError, Mean
from slora_flwr.wire.clipping import clip, norm
from slora_flwr.wire.codec import Codec

# Allowance for the arithmetic of a norm: float64 over any number of values.
_SLACK = 1e-9


class ClippedMean(Mean):
    """The mean of updates clipped to a norm, over a fixed number of clients.

    Every client has weight 1, since numbers of examples are private. The sum is divided
    by the expected number of clients, whoever answered (DP-FedAvg, arXiv 1710.06963).
    Adding or removing one client changes the sum by at most `bound`.

    Parameters
    ----------
    bound : float
        Largest L2 norm of a client's update over all its values.
    expected : int
        Expected number of clients in a round.
    codec : Codec
        Encoding of updates.
    """

    def __init__(self, bound: float, expected: int, codec: Codec = PLAIN) -> None:
        super().__init__(codec=codec)
        self._bound, self._clients = bound, expected

    def expect(self, weight: int) -> None:
        """Do nothing: clipped updates cannot exhaust the range."""

    def add(self, update: Mapping[str, Tensor], weight: int, client: int = 0) -> None:
        """Add one client's update, as the server reads it; see `Mean.add`."""
        exact = clip({name: t.double() for name, t in update.items()}, self._bound)
        # Rounding towards zero never lengthens an update.
        held = {name: (t * SCALE).trunc() / SCALE for name, t in exact.items()}
        super().add(held, 1, client)

    def take(
        self,
        array: Array,
        shapes: Mapping[str, Sequence[int]],
        clients: Sequence[int],
        weights: Sequence[int],
    ) -> None:
        """Add a node's reply; see `Mean.take`."""
        super().take(array, shapes, clients, [1] * len(clients))

    def perturb(
        self,
        noise_multiplier: float,
        shapes: Mapping[str, Sequence[int]],
        generator: np.random.Generator,
    ) -> None:
        """Add Gaussian noise to the sum.

        Sums are whole multiples of 1 / `SCALE`, and the noise is rounded to such
        multiples. The result equals the rounded sum of exact values and exact noise, so
        the last bits of floats leak nothing (Mironov, CCS 2012).

        Parameters
        ----------
        noise_multiplier : float
            Standard deviation divided by the bound.
        shapes : Mapping[str, Sequence[int]]
            The layout of an update; noise is added even if no client answered.
        generator : numpy.random.Generator
            Source of the noise.
        """
        std = noise_multiplier * self._bound * SCALE
        noise = {
            name: generator.normal(0.0, std, tuple(shape)).round()
            for name, shape in shapes.items()
        }
        self.merge({n: torch.from_numpy(t).long() for n, t in noise.items()}, 0)

    def _empty(self) -> Self:
        return type(self)(self._bound, self._clients, self._codec)

    def _check_norm(self, update: Mapping[str, Tensor], unit: float) -> None:
        """Check that a node's sum is no longer than its clients' bounds together.

        The update of a node's only client is clipped instead, when it is added.
        """
        clients = round(unit / SCALE)  # 0 for an update that is no sum
        most = clients * self._bound
        if clients and (found := norm(update) / SCALE) > most * (1 + _SLACK):
            raise FoldError(
                f"its sum has norm {found:.6g}; allowed: up to {most:.6g}, {clients} "
                f"times the bound of {self._bound:g} that privacy sets"
            )

    def _divisor(self, name: str, sums: Tensor) -> Tensor | int:
        return self._clients


class ClippedAggregator(Aggregator):
    """The mean of clipped updates, in place of a method's own mean."""

    def make_fold(self) -> ClippedMean:
        """Return an empty fold that clips each client's update."""
        bound = self.config.privacy.bound(self.phase.adapter_type.section)
        return ClippedMean(bound, self.config.clients.per_round, self.codec)
