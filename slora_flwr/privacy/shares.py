"""Noise that clients add in shares, so that no sum is ever known without it.

Kairouz, Liu and Steinke (ICML 2021). Each client's share is so large that those of the
fewest clients that a round may end with, less those that may collude with the server,
are noise enough. The server knows who takes part in a round, so that sampling hides
nothing from it: what counts is in how many rounds a client takes part. Neighbours
differ by one client, all of whose updates are replaced by zeros.
"""

import math

from slora_flwr.config import RunConfig
from slora_flwr.privacy.accountant import Release, calibrate, epsilon


def noise_multiplier(config: RunConfig) -> float:
    """Return the standard deviation of the noise of `sharers`, over the sensitivity."""
    privacy = config.privacy
    if not privacy.epsilon:
        return privacy.noise_multiplier
    delta = privacy.delta_of(config.clients.count)
    releases = [Release(1.0, 0.0, config.participations)]
    return calibrate(releases, privacy.epsilon, delta)


def share_multiplier(config: RunConfig) -> float:
    """Return the standard deviation of a client's share, over the sensitivity."""
    return noise_multiplier(config) / math.sqrt(config.sharers)


def epsilon_of(config: RunConfig, rounds: int) -> float:
    """Return the epsilon that some rounds have spent of any client."""
    steps = min(rounds, config.participations)
    releases = [Release(1.0, noise_multiplier(config), steps)]
    return epsilon(releases, config.privacy.delta_of(config.clients.count))
