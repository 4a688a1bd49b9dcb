"""Client-level differential privacy against the server too: clients add the noise."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from slora_flwr.aggregation.mean import Mean
from slora_flwr.common.random import key
from slora_flwr.config import RunConfig
from slora_flwr.privacy.shares import epsilon_of, noise_multiplier


class ClientNoise:
    """A run's cohorts and its guarantee, where clients add noise in shares.

    Parameters
    ----------
    config : RunConfig
        A config with `privacy.trust` sums.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self.delta = config.privacy.delta_of(config.clients.count)
        self.noise_multiplier = noise_multiplier(config)
        self._rounds: Counter[int] = Counter()

    def draw(self, clients: Iterable[int], server_round: int) -> list[int]:
        """Return a round's cohort among the clients online, ascending.

        Those that took part least often come first, so that all take turns. None takes
        part more often than the noise is for.
        """
        config = self._config
        stream = np.random.Philox(key=key("cohort", config.seed, server_round))
        order = np.random.Generator(stream).permutation(config.clients.count)
        able = [c for c in clients if self._rounds[c] < config.participations]
        able.sort(key=lambda client: (self._rounds[client], order[client]))
        drawn = sorted(able[: config.clients.per_round])
        self._rounds.update(drawn)
        return drawn

    def perturb(self, fold: Mean, shapes: Mapping[str, Sequence[int]]) -> None:
        """Do nothing: the sum had its noise before it was known."""

    def epsilon(self, rounds: int) -> float:
        """Return the epsilon spent of any client after some rounds, at `delta`."""
        return epsilon_of(self._config, rounds)

    def facts(self, rounds: int) -> dict[str, Any]:
        """Return the guarantee after some rounds, for the run's files."""
        return {
            "unit": "client",
            "epsilon": self.epsilon(rounds),
            "delta": self.delta,
            "noise_multiplier": self.noise_multiplier,
        }
