"""Differential privacy: clients' sampling and noise, and what has been spent.

With `privacy.unit` `client` the server adds the noise, and `Privacy` has the guarantee.
With `example` the clients do, and `ExampleLedger` counts what they have spent.

The guarantee is (epsilon, delta) for the global states of all rounds and phases, when
one client is added or removed, whatever its data. The server is trusted. Each round is
a Poisson-sampled Gaussian mechanism: each client joins independently with the same
probability, its update is clipped, and noise is added to the sum of updates, see
`slora_flwr.aggregation.clipped`. Computing on noised sums, such as a handoff's SVD,
spends no further privacy.

Cohorts have no fixed size, unlike those without privacy. With 2,000 clients, 100 per
round, 15 rounds and noise multiplier 1, dp-accounting bounds epsilon by 1.7. Its bound
for cohorts of a fixed size, where one client replaces another, is 10.6.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from slora_flwr.aggregation.clipped import ClippedMean
from slora_flwr.aggregation.mean import Mean
from slora_flwr.common.random import key
from slora_flwr.config import ConfigError, RunConfig
from slora_flwr.config.schedule import make_schedule
from slora_flwr.privacy.accountant import Release, calibrate, epsilon
from slora_flwr.privacy.examples import BudgetError, ExamplePrivacy

# The largest standard deviation of noise. Noise is drawn in float64: beyond this its
# steps near those of the sums' grid, and their last bits would show through.
_MOST_NOISE = 2.0**15


class Privacy:
    """A run's sampling and noise, and the guarantee that they give.

    Parameters
    ----------
    config : RunConfig
        A config with privacy on.
    generator : numpy.random.Generator or None
        Source of cohorts and noise; None for one that the operating system seeds. The
        run's seed is not secret.

    Raises
    ------
    ConfigError
        If the noise would be too coarse to hide the last bits of sums.
    """

    def __init__(
        self, config: RunConfig, generator: np.random.Generator | None = None
    ) -> None:
        self._generator = generator or np.random.default_rng()
        self._secret = self._generator.bytes(16).hex()
        privacy, clients = config.privacy, config.clients
        self._population = clients.count
        self._rate = clients.per_round / clients.count
        self.delta = privacy.delta_of(clients.count)
        self.noise_multiplier = privacy.noise_multiplier
        if privacy.epsilon:
            self.noise_multiplier = calibrate(
                [Release(self._rate, 0.0, config.rounds)], privacy.epsilon, self.delta
            )
        bounds = privacy.clip_norm, privacy.sparse_clip_norm, privacy.lora_clip_norm
        if (std := self.noise_multiplier * max(bounds)) > _MOST_NOISE:
            raise ConfigError(
                f"privacy.clip-norm is {max(bounds):g}; allowed: up to "
                f"{_MOST_NOISE / self.noise_multiplier:.4g} at noise multiplier "
                f"{self.noise_multiplier:.4g}, since noise of standard deviation "
                f"{std:.4g} would be too coarse to hide the last bits of sums"
            )

    def draw(self, clients: Iterable[int], server_round: int) -> list[int]:
        """Return a round's cohort among the clients online, ascending.

        Whether a client is drawn does not depend on which others are online. A repeated
        round has the same cohort, since a new one would depend on which clients failed.
        """
        stream = np.random.Philox(key=key("cohort", self._secret, server_round))
        drawn = np.random.Generator(stream).random(self._population) < self._rate
        return [client for client in sorted(clients) if drawn[client]]

    def perturb(self, fold: Mean, shapes: Mapping[str, Sequence[int]]) -> None:
        """Add a round's noise to the sum of its updates."""
        ClippedMean.of(fold).perturb(self.noise_multiplier, shapes, self._generator)

    def epsilon(self, rounds: int) -> float:
        """Return the epsilon spent after a number of rounds, at `delta`."""
        releases = [Release(self._rate, self.noise_multiplier, rounds)]
        return epsilon(releases, self.delta)

    def facts(self, rounds: int) -> dict[str, Any]:
        """Return the guarantee after some rounds, for the run's files."""
        return {
            "unit": "client",
            "epsilon": self.epsilon(rounds),
            "delta": self.delta,
            "noise_multiplier": self.noise_multiplier,
        }


class ExampleLedger:
    """What clients' trainings have spent of the privacy of their examples.

    It follows from their numbers of examples, which are public, and counts each
    training that was asked for, whether or not it was answered.

    Parameters
    ----------
    config : RunConfig
        A config with privacy of examples.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._asked: dict[int, Counter[int]] = {}

    def note(self, phase: int, clients: Iterable[int]) -> None:
        """Note that clients were asked to train in a phase, by its index."""
        for client in clients:
            self._asked.setdefault(client, Counter())[phase] += 1

    def foresee(self, clients: Iterable[int]) -> None:
        """Note that clients were asked to train in every round of the run."""
        every = [*clients]
        for index, phase in enumerate(make_schedule(self._config)):
            for _ in range(phase.rounds):
                self.note(index, every)

    def facts(self, sizes: Mapping[int, int]) -> dict[str, Any]:
        """Return the guarantee of the client that has spent most.

        Parameters
        ----------
        sizes : Mapping[int, int]
            Numbers of examples, by client.
        """
        found = [(0.0, 0.0, 0.0)]
        for size, asked in {
            (sizes[client], tuple(sorted(asked.items())))
            for client, asked in self._asked.items()
            if client in sizes
        }:
            with suppress(BudgetError):  # which does not train
                privacy = ExamplePrivacy(self._config, size)
                spent = privacy.epsilon(dict(asked))
                found.append((spent, privacy.noise_multiplier, privacy.delta))
        most, noise, _ = max(found)
        return {
            "unit": "example",
            "epsilon": most,
            "delta": max(delta for _, _, delta in found),
            "noise_multiplier": noise,
        }
