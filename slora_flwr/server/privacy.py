"""Client-level differential privacy: who is drawn, how much noise, what it has cost.

The guarantee is of the global states, for adding or removing one client, whatever it
holds: (epsilon, delta) over all rounds of all phases. The server is trusted. Each round
is a Poisson-sampled Gaussian mechanism: every client of the population is in it by
itself with one probability, its update is clipped, and noise is added to the sum, see
`slora_flwr.aggregation.clipped`. All that follows from noised sums, a handoff's SVD
among it, costs nothing more.

Rounds are not drawn with a fixed number of clients, as they are without privacy: at
2,000 clients, 100 a round, 15 rounds and noise multiplier 1 dp-accounting's bound for
that, with one client replaced by another, is epsilon 10.6, and 1.7 as it is done here.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import dp_accounting
import numpy as np
from dp_accounting.rdp import RdpAccountant

from slora_flwr.aggregation.clipped import ClippedMean
from slora_flwr.aggregation.mean import Mean
from slora_flwr.common.random import key
from slora_flwr.config import RunConfig


class Privacy:
    """What a run's server keeps secret, and what its noise has bought.

    Parameters
    ----------
    config : RunConfig
        With privacy on.
    generator : numpy.random.Generator or None
        Source of cohorts and noise; None for one that the operating system's entropy
        seeds. The run's seed would be no secret.
    """

    def __init__(
        self, config: RunConfig, generator: np.random.Generator | None = None
    ) -> None:
        self._generator = generator or np.random.default_rng()
        self._secret = self._generator.bytes(16).hex()
        privacy, clients = config.privacy, config.clients
        self._population = clients.count
        self._rate = clients.per_round / clients.count
        self.delta = privacy.delta or clients.count**-1.1
        self.noise_multiplier = privacy.noise_multiplier
        if privacy.epsilon:
            self.noise_multiplier = self._calibrate(privacy.epsilon, config.rounds)

    def draw(self, clients: Iterable[int], server_round: int) -> list[int]:
        """Return a round's cohort among the clients online, ascending.

        Whether a client is drawn does not depend on who else is online. A round that is
        held again has the same cohort: a new one would depend on who failed.
        """
        stream = np.random.Philox(key=key("cohort", self._secret, server_round))
        drawn = np.random.Generator(stream).random(self._population) < self._rate
        return [client for client in sorted(clients) if drawn[client]]

    def perturb(self, fold: Mean, shapes: Mapping[str, Sequence[int]]) -> None:
        """Add a round's noise to the sum of its updates."""
        ClippedMean.of(fold).perturb(self.noise_multiplier, shapes, self._generator)

    def epsilon(self, rounds: int) -> float:
        """Return what so many rounds have spent at `delta`."""
        event = self._event(self.noise_multiplier, rounds)
        with _quiet():
            return float(RdpAccountant().compose(event).get_epsilon(self.delta))

    def facts(self, rounds: int) -> dict[str, float]:
        """Return what so many rounds come to, for config.toml and summary.json."""
        return {
            "epsilon": self.epsilon(rounds),
            "delta": self.delta,
            "noise_multiplier": self.noise_multiplier,
        }

    def _event(self, noise_multiplier: float, rounds: int) -> dp_accounting.DpEvent:
        noise = dp_accounting.GaussianDpEvent(noise_multiplier)
        sampled = dp_accounting.PoissonSampledDpEvent(self._rate, noise)
        return dp_accounting.SelfComposedDpEvent(sampled, rounds)

    def _calibrate(self, epsilon: float, rounds: int) -> float:
        with _quiet():
            return float(
                dp_accounting.calibrate_dp_mechanism(
                    RdpAccountant,
                    lambda noise: self._event(noise, rounds),
                    epsilon,
                    self.delta,
                )
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the accountant from warning of each order that it can do without.

    absl would give the root logger a handler for it, and Flower's lines come twice.
    """
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
