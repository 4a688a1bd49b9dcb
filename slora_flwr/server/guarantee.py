"""What a run's privacy has the server do, whoever adds the noise."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from slora_flwr.aggregation.mean import Mean
from slora_flwr.config import RunConfig
from slora_flwr.server.client_noise import ClientNoise
from slora_flwr.server.privacy import Privacy


class Guarantee(Protocol):
    """A run's cohorts, its noise, and the guarantee that they give."""

    def draw(self, clients: Iterable[int], server_round: int) -> list[int]:
        """Return a round's cohort among the clients online, ascending."""

    def perturb(self, fold: Mean, shapes: Mapping[str, Sequence[int]]) -> None:
        """Add a round's noise to the sum of its updates, if the server adds it."""

    def epsilon(self, rounds: int) -> float:
        """Return the epsilon spent after a number of rounds."""

    def facts(self, rounds: int) -> dict[str, Any]:
        """Return the guarantee after some rounds, for the run's files."""


def make_guarantee(
    config: RunConfig, generator: np.random.Generator | None = None
) -> Guarantee | None:
    """Return a run's guarantee; None without privacy.

    Parameters
    ----------
    config : RunConfig
        The run.
    generator : numpy.random.Generator or None
        As for `Privacy`.
    """
    if not config.privacy.is_on:
        return None
    if config.shares_noise:
        return ClientNoise(config)
    return Privacy(config, generator)
