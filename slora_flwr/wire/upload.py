"""What a client sends of its update, and what it keeps for later."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Array
from torch import Tensor

from slora_flwr.common.tensors import State
from slora_flwr.wire.clipping import clip
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.selection import choose, weigh_by_product


@dataclass(frozen=True)
class Upload:
    """A coded update.

    Attributes
    ----------
    array : Array
        What travels.
    update : State
        What the server reads of it.
    residual : State
        What that lacks of the update; empty where nothing is lost.
    """

    array: Array
    update: State
    residual: State = field(default_factory=dict)


def code_update(
    update: State,
    codec: Codec,
    *,
    residual: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    importance: str,
    stream: np.random.Philox,
    clip_norm: float = 0.0,
) -> Upload:
    """Code an update, with what earlier ones have lost added: error feedback.

    Error feedback (arXiv 1901.09847) sends later what rounding and selection leave out
    now, so that nothing is lost for good.

    Parameters
    ----------
    update : State
        One client's, float32.
    codec : Codec
        How it travels.
    residual : Mapping[str, Tensor]
        What the client's last update lacked, by name; none is as good as zeros.
    start : Mapping[str, Tensor]
        What the client was sent, and what rests: a frozen A.
    importance : str
        `magnitude` or `product`, where a share travels.
    stream : numpy.random.Philox
        For stochastic rounding.
    clip_norm : float
        Bound of the norm of what is coded, 0 for none. What it cuts off is not kept:
        it would come back round after round.
    """
    whole = {n: t + residual[n] if n in residual else t for n, t in update.items()}
    whole = clip(whole, clip_norm)
    if codec.is_exact:
        return Upload(codec.encode(whole), whole)
    chosen = None
    if codec.share:
        count = sum(tensor.numel() for tensor in whole.values())
        weights = {name: tensor.abs() for name, tensor in whole.items()}
        if importance == "product":
            trained = {n: t + update[n] if n in update else t for n, t in start.items()}
            weights = weigh_by_product(whole, trained)
        chosen = choose(weights, codec.parts(count), codec.head)
    array = codec.encode(whole, chosen, stream)
    read = codec.decode(array, {name: t.shape for name, t in whole.items()})
    return Upload(array, read, {name: t - read[name] for name, t in whole.items()})
