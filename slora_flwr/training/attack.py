"""Hostile clients of a simulation, for measuring defences.

- `label-flip`: a hostile client trains on labels that are rotated by one class.
- `scaled-update`: it trains honestly and sends `scale` times its update.

Hostile clients respect `server.clip-norm`; the server would refuse them otherwise.
"""

from functools import cache

import numpy as np

from slora_flwr.common.random import draw_distinct, key
from slora_flwr.common.tensors import State
from slora_flwr.config import RunConfig


def is_hostile(config: RunConfig, client: int) -> bool:
    """Return whether a client is hostile."""
    attack = config.attack
    if attack.kind == "none":
        return False
    return client in _draw(config.seed, attack.share, config.clients.count)


def is_flipped(config: RunConfig, client: int) -> bool:
    """Return whether a client trains on spoilt labels."""
    return config.attack.kind == "label-flip" and is_hostile(config, client)


def spoil_update(config: RunConfig, client: int, update: State) -> State:
    """Return the update the client sends, scaled if it is hostile."""
    if config.attack.kind != "scaled-update" or not is_hostile(config, client):
        return update
    return {name: tensor * config.attack.scale for name, tensor in update.items()}


@cache
def _draw(seed: int, share: float, count: int) -> frozenset[int]:
    stream = np.random.Philox(key=key("hostile", seed))
    return frozenset(draw_distinct(stream, round(share * count), count).tolist())
