"""The sum of updates as whole numbers of a ring, which may be masked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slora_flwr.aggregation.mean import FoldError, Mean
from slora_flwr.config import GRID_LEVELS, ConfigError, RunConfig
from slora_flwr.privacy.discrete_gaussian import LEAST_STD, Words, draw, entropy
from slora_flwr.privacy.shares import share_multiplier
from slora_flwr.secure.ring import FIGURES, Ring
from slora_flwr.wire.grid import MOST_LEVELS, Grid
from slora_flwr.wire.messages import MOST_FIGURE
from slora_flwr.wire.state_channel import Upload

# Losses and norms are summed as whole multiples of 1 / FINE.
FINE = 2**20
# The figures beside the values, in their order.
NAMES = ("clients", "weight", "loss", "norm", "clipped")
# A sum's noise has no value beyond so many standard deviations, but one in 10^11.
_NOISE_REACH = 7.0


@dataclass(frozen=True)
class Numbers:
    """How a round's updates become whole numbers, and where these are summed.

    Attributes
    ----------
    grid : Grid
        The grid of an update.
    most : int
        The most that a cohort weighs.
    clients : int
        The most clients in a cohort.
    share : float
        The standard deviation of a client's noise, over the grid's sensitivity.
    """

    grid: Grid
    most: int
    clients: int
    share: float

    @classmethod
    def of(cls, config: RunConfig, section: str, count: int) -> "Numbers":
        """Return the numbers of updates of `count` values in a phase with a section.

        The ring is as large as a sum of the cohort's largest updates and its noise need
        at the levels of `upload.dtype`, and the grid as fine as that ring lets it be.

        Raises
        ------
        ConfigError
            If no ring is large enough.
        """
        share = share_multiplier(config) if config.shares_noise else 0.0
        levels = GRID_LEVELS[config.upload.dtype]
        bound = config.secure_bound(section)
        grid = Grid(count, bound, levels, config.seed, is_strict=config.shares_noise)
        most = config.most_weight_of_cohort
        numbers = cls(grid, most, config.clients.per_round, share)
        while share and numbers.std < LEAST_STD:
            numbers = numbers.at(2 * numbers.grid.levels)
        try:
            reach = numbers.ring.reach
        except ValueError as error:
            allowed = "a type of fewer bits, or less noise"
            raise ConfigError(
                f"upload.dtype is {config.upload.dtype!r}; allowed: {allowed}, since "
                f"with the noise of {config.clients.per_round} clients {error}"
            ) from error
        fits, beyond = numbers.grid.levels, max(MOST_LEVELS, numbers.grid.levels) + 1
        while beyond - fits > 1:
            middle = (fits + beyond) // 2
            if numbers.at(middle).largest <= reach:
                fits = middle
            else:
                beyond = middle
        return numbers.at(fits)

    def at(self, levels: int) -> "Numbers":
        """Return the same numbers on a grid of other levels."""
        return replace(self, grid=replace(self.grid, levels=levels))

    @property
    def std(self) -> float:
        """The standard deviation of a client's noise, in steps."""
        return self.share * self.grid.sensitivity

    @property
    def largest(self) -> int:
        """The largest magnitude of a sum's values."""
        noise = _NOISE_REACH * self.std * math.sqrt(self.clients)
        return self.grid.levels * self.most + math.ceil(noise)

    @cached_property
    def ring(self) -> Ring:
        """The smallest ring for the sum."""
        return Ring.for_sum(self.largest)

    def longest(self, weight: int, clients: int) -> float:
        """Return the largest L2 norm, in steps, of the sum of honest clients."""
        grid = self.grid
        # Rounding moves each value by less than a step.
        updates = (grid.bound / grid.step + math.sqrt(grid.size)) * weight
        noise = (math.sqrt(grid.size) + _NOISE_REACH) * self.std * math.sqrt(clients)
        return updates + noise


class RingSum(Mean):
    """The sum of clients' weighted updates modulo a power of two.

    Parameters
    ----------
    config : RunConfig
        A run with secure aggregation. With privacy all clients weigh the same, and add
        noise.
    section : str
        The config section of the phase's adapter.
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
        The sums of what `NAMES` says. Losses are weighted. With noise only clients and
        weight are summed, since the others tell of data.
    has_noise : bool
        Whether clients add noise.
    """

    def __init__(
        self, config: RunConfig, section: str, shapes: Mapping[str, Sequence[int]]
    ) -> None:
        super().__init__()
        self._numbers = Numbers.of(config, section, _count(shapes))
        self.ring, self.grid = self._numbers.ring, self._numbers.grid
        self.has_noise = config.shares_noise
        self.values = self.ring.zeros(self.grid.size)
        self.figures = np.zeros(len(NAMES), FIGURES)
        self._shapes = shapes

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
        weight = 1 if self.has_noise else weight
        loss = min(max(loss, 0.0), MOST_FIGURE)
        # Modulo the ring's power of two, as a cast of negative numbers is.
        codes = self.grid.codes(upload.array).astype(self.ring.dtype)
        codes *= self.ring.dtype.type(weight % 2**self.ring.bits)
        np.add(self.values, codes, out=self.values)
        share = upload.norm / self.grid.bound
        told = (1, weight, _fine(loss) * weight, _fine(min(share, 1)), share > 1)
        known = told[:2] if self.has_noise else told
        self.figures[: len(known)] += np.array([*map(int, known)], FIGURES)
        self.weight += weight

    def perturb(self, words: Words = entropy) -> None:
        """Add the noise of all clients in the sum; nothing where they add none.

        Parameters
        ----------
        words : Callable
            As for `slora_flwr.privacy.discrete_gaussian.draw`.
        """
        if self.has_noise and (clients := self.total("clients")):
            # One draw cannot be told from the sum of several: see where it is drawn.
            std = self._numbers.std * math.sqrt(clients)
            noise = draw(std, self.grid.size, words).astype(self.ring.dtype)
            np.add(self.values, noise, out=self.values)

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
            0 < clients == count <= weight <= self._numbers.most
            and norm <= clients * FINE
            and clipped <= clients
            and loss <= weight * _fine(MOST_FIGURE)
        ):
            raise FoldError(f"a client sent figures that cannot be: {figures.tolist()}")
        self.figures, self.weight, self._opened = figures, weight, values
        length = float(np.linalg.norm(values.astype(np.float64)))
        most = self._numbers.longest(weight, clients)
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


def grid_of(
    config: RunConfig, section: str, shapes: Mapping[str, Sequence[int]]
) -> Grid:
    """Return the grid of updates of a layout in a phase with a config section."""
    return Numbers.of(config, section, _count(shapes)).grid


def masked_bytes(config: RunConfig, section: str, count: int) -> int:
    """Return the bytes of a masked sum of updates of `count` values, and figures."""
    numbers = Numbers.of(config, section, count)
    size = numbers.grid.size * numbers.ring.item_size
    return size + len(NAMES) * FIGURES.itemsize


def _count(shapes: Mapping[str, Sequence[int]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _fine(value: float) -> int:
    return round(value * FINE)
