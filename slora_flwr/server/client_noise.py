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
        # By client, the rounds before the last one, and who was drawn in that.
        self._done: Counter[int] = Counter()
        self._last, self._drawn = 0, set[int]()

    def draw(self, clients: Iterable[int], server_round: int) -> list[int]:
        """Return a round's cohort among the clients online, ascending.

        Those that took part least often come first, so that all take turns. None takes
        part in more rounds than the noise is for. A round that is tried again counts
        once, and one of too few clients, which has no sum, not at all.
        """
        config = self._config
        if server_round != self._last:
            self._done.update(self._drawn)
            self._last, self._drawn = server_round, set[int]()
        stream = np.random.Philox(key=key("cohort", config.seed, server_round))
        order = np.random.Generator(stream).permutation(config.clients.count)
        able = [c for c in clients if self._done[c] < config.participations]
        able.sort(key=lambda client: (self._done[client], order[client]))
        drawn = sorted(able[: config.clients.per_round])
        if len(drawn) >= config.clients.min_replies:
            self._drawn.update(drawn)
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
