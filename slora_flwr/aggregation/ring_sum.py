"""The sum of updates as whole numbers of a ring, which may be masked."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slora_flwr.aggregation.mean import FoldError, Mean
from slora_flwr.config import GRID_LEVELS, RunConfig
from slora_flwr.secure.ring import FIGURES, Ring
from slora_flwr.wire.grid import MOST_LEVELS, Grid
from slora_flwr.wire.messages import MOST_FIGURE
from slora_flwr.wire.state_channel import Upload

# Losses and norms are summed as whole multiples of 1 / FINE.
FINE = 2**20
# The figures beside the values, in their order.
NAMES = ("clients", "weight", "loss", "norm", "clipped")


class RingSum(Mean):
    """The sum of clients' weighted updates modulo a power of two.

    The ring is as large as a sum of the cohort's largest updates needs, and the grid as
    fine as the ring lets it be.

    Parameters
    ----------
    config : RunConfig
        A run with secure aggregation.
    shapes : Mapping[str, Sequence[int]]
        The layout of an update.

    Attributes
    ----------
    ring : Ring
        Where the numbers are summed.
    grid : Grid
        The grid of an update.
    values : NDArray
        The sum of the values, of the ring's type.
    figures : NDArray[np.uint64]
        The sums of what `NAMES` says. Losses are weighted.
    """

    def __init__(self, config: RunConfig, shapes: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.ring, self.grid = ring_of(config), grid_of(config, shapes)
        self.values = self.ring.zeros(self.grid.size)
        self.figures = np.zeros(len(NAMES), FIGURES)
        self._shapes, self._most = shapes, config.most_weight_of_cohort

    def add_upload(
        self, upload: Upload, weight: int, client: int = 0, loss: float = 0.0
    ) -> None:
        """Add one client's rounded update, and its figures.

        Raises
        ------
        FoldError
            If its loss is not finite, or its weight is none.
        """
        if not (math.isfinite(loss) and weight > 0):
            raise FoldError(f"its loss is {loss:.3g} and its weight {weight}")
        loss = min(max(loss, 0.0), MOST_FIGURE)
        # Modulo the ring's power of two, as a cast of negative numbers is.
        codes = self.grid.codes(upload.array).astype(self.ring.dtype)
        codes *= self.ring.dtype.type(weight % 2**self.ring.bits)
        np.add(self.values, codes, out=self.values)
        share = upload.norm / self.grid.bound
        told = (1, weight, _fine(loss) * weight, _fine(min(share, 1)), share > 1)
        self.figures += np.array([int(figure) for figure in told], FIGURES)
        self.weight += weight

    def open(
        self, values: NDArray[np.int64], figures: NDArray[np.uint64], count: int
    ) -> None:
        """Take the sum of `count` clients, as whole numbers.

        Raises
        ------
        FoldError
            If honest clients cannot have such a sum.
        """
        clients, weight, loss, norm, clipped = map(int, figures)
        if not (
            0 < clients == count <= weight <= self._most
            and norm <= clients * FINE
            and clipped <= clients
            and loss <= weight * _fine(MOST_FIGURE)
        ):
            raise FoldError(f"a client sent figures that cannot be: {figures.tolist()}")
        self.figures, self.weight, self._opened = figures, weight, values
        # Rounding moves each value by less than a step.
        length = float(np.linalg.norm(values.astype(np.float64)))
        most = (self.grid.bound / self.grid.step + self.grid.size**0.5) * weight
        if length > most:
            raise FoldError(
                f"the mean update has norm {length / weight * self.grid.step:.4g}; "
                f"allowed: up to {most / weight * self.grid.step:.4g}, since each "
                f"client clips its own to {self.grid.bound:g}: one sent something else"
            )

    def total(self, name: str) -> int:
        """Return a figure's sum, as a whole number; see `NAMES`."""
        return int(self.figures[NAMES.index(name)])

    def mean(self, name: str) -> float:
        """Return the weighted mean loss, or the mean norm as a share of the bound."""
        over = self.total("weight" if name == "loss" else "clients")
        return self.total(name) / over / FINE

    def result(self) -> dict[str, Tensor]:
        """Return the mean of the sum that was opened, float32."""
        return self.grid.place(self._opened, self.weight, self._shapes)


def ring_of(config: RunConfig) -> Ring:
    """Return the smallest ring for a cohort's sum at the levels of `upload.dtype`."""
    levels = GRID_LEVELS[config.upload.dtype]
    return Ring.for_sum(levels * config.most_weight_of_cohort)


def grid_of(config: RunConfig, shapes: Mapping[str, Sequence[int]]) -> Grid:
    """Return the grid of updates of a layout, as fine as the ring lets it be."""
    count = sum(math.prod(shape) for shape in shapes.values())
    levels = ring_of(config).reach // config.most_weight_of_cohort
    return Grid(count, config.secure_bound, min(levels, MOST_LEVELS), config.seed)


def masked_bytes(config: RunConfig, count: int) -> int:
    """Return the bytes of a masked sum of updates of `count` values, and figures."""
    grid = grid_of(config, {"": (count,)})
    return grid.size * ring_of(config).item_size + len(NAMES) * FIGURES.itemsize


def _fine(value: float) -> int:
    return round(value * FINE)
