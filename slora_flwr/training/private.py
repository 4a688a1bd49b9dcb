"""One client's local training with privacy of each example: DP-SGD.

Algorithm 1 of Abadi et al. (arXiv 1607.00133). Each step draws every example with the
same probability, clips each one's gradient over all trained values together, and adds
Gaussian noise to the sum.
"""

import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slora_flwr.adapters.base import Adapter
from slora_flwr.backbone.load import Backbone
from slora_flwr.config import RecipeConfig
from slora_flwr.data.examples import Examples
from slora_flwr.training.example_gradients import ExampleGradients, row_norms
from slora_flwr.training.loop import DeadlineError, LocalOptimizer, checkpointing

# Gradients and noise are whole numbers of this share of the bound. Sums of them are
# exact in float64, so that last bits tell nothing of the order or the number of parts
# (Mironov, CCS 2012). A clipped gradient's values are exact in float32.
LEVELS = 2**22
# Of the bound, by which clipping stays below it: more than its rounding errors.
_MARGIN = 2.0**-20


def train_privately(
    backbone: Backbone,
    adapter: Adapter,
    examples: Examples,
    recipe: RecipeConfig,
    bound: float,
    noise_multiplier: float,
    until: float = math.inf,
    generator: np.random.Generator | None = None,
) -> None:
    """Train an attached adapter from the state it has loaded.

    Parameters
    ----------
    backbone, adapter, examples, recipe, until
        As for `slora_flwr.training.loop.train`. The rate at which a step draws an
        example is `batch-size` over their number.
    bound : float
        The most that an example's gradient counts for, as an L2 norm.
    noise_multiplier : float
        The standard deviation of the noise on a step's sum, over the bound.
    generator : numpy.random.Generator or None
        Source of draws and noise; None for one that the operating system seeds. The
        run's seed is not secret.

    Raises
    ------
    DeadlineError
        If steps are left at that time.
    """
    generator = generator or np.random.default_rng()
    # Dropout: were its seed known, one example more would change the others' gradients.
    torch.manual_seed(int(generator.integers(2**63)))
    optimizer = LocalOptimizer(adapter, recipe)
    # In bf16 an example's gradient would depend on what it is padded to.
    precision = "float32" if recipe.precision == "auto" else recipe.precision
    gradients = ExampleGradients(backbone, adapter, precision)
    model = backbone.model.train()
    count = len(examples)
    rate = min(1.0, recipe.batch_size / count)
    with checkpointing(model, on=recipe.checkpointing):
        for _ in range(recipe.steps_of(count)):
            total = GridSum(optimizer.parameters, bound)
            for part in parts_of(examples, draw(count, rate, generator), recipe):
                if time.monotonic() >= until:
                    raise DeadlineError("the round's deadline passed as it trained")
                found = gradients.of(examples.batch(part))
                total.add(found, examples.units[part])
            total.perturb(noise_multiplier, generator)
            for parameter, mean in zip(
                optimizer.parameters, total.over(rate * count), strict=True
            ):
                parameter.grad = mean
            optimizer.step()


def draw(count: int, rate: float, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return the rows of a step's batch: each of `count` with the same probability."""
    return np.flatnonzero(generator.random(count) < rate)


def parts_of(
    examples: Examples, rows: NDArray[np.int64], recipe: RecipeConfig
) -> Iterator[NDArray[np.int64]]:
    """Yield a drawn batch in parts as large as those of a batch of the usual size."""
    if len(rows):
        most = -(-recipe.batch_size // recipe.accumulate)
        yield from examples.parts(rows, -(-len(rows) // most), recipe.tokens)


class GridSum:
    """A sum of clipped gradients, and its noise, as whole numbers of a grid.

    Parameters
    ----------
    parameters : Sequence[Tensor]
        The parameters, for shapes, types and devices.
    bound : float
        The most that an example's gradient counts for, as an L2 norm.
    """

    def __init__(self, parameters: Sequence[Tensor], bound: float) -> None:
        self._like, self._bound = parameters, bound
        self.sums = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]

    @torch.no_grad()
    def add(self, gradients: Sequence[Tensor], units: NDArray[np.int64]) -> None:
        """Add the gradients of some examples' losses, each clipped by itself.

        Whatever an example's gradient is, its share of the whole numbers has a norm of
        at most `LEVELS`. One that is not finite counts as none.

        Parameters
        ----------
        gradients : Sequence[Tensor]
            By parameter, (rows, *parameter), float32. They are changed.
        units : NDArray[np.int64]
            What each example's loss is a sum of, by which it is divided.
        """
        norms = row_norms(gradients)
        over = torch.from_numpy(np.maximum(units, 1)).to(norms)
        factors = torch.minimum(1 / over, self._bound / norms) * (LEVELS / self._bound)
        factors = torch.where(norms.isfinite(), factors * (1 - _MARGIN), 0.0)
        # Beyond float32 a gradient of zeros would no longer be one.
        factors = factors.clamp(max=torch.finfo(torch.float32).max).float()
        is_finite = bool(norms.isfinite().all())
        for total, g in zip(self.sums, gradients, strict=True):
            if not is_finite:
                g.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            g.mul_(factors.view(-1, *[1] * (g.ndim - 1))).trunc_()
            total.add_(g.sum(dim=0, dtype=torch.float64))

    def perturb(self, noise_multiplier: float, generator: np.random.Generator) -> None:
        """Add noise of `noise_multiplier` times the bound to every value."""
        for total in self.sums:
            noise = generator.standard_normal(tuple(total.shape))
            noise *= noise_multiplier * LEVELS
            total.add_(torch.from_numpy(np.rint(noise, out=noise)).to(total.device))

    def over(self, count: float) -> list[Tensor]:
        """Return the sum over a number of examples, in the parameters' types."""
        share = self._bound / LEVELS / count
        return [
            (t * share).to(p.dtype) for t, p in zip(self.sums, self._like, strict=True)
        ]
