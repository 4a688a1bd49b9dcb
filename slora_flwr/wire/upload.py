"""The encoded update that a client sends, and the residual that it keeps."""

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
    """An encoded update.

    Attributes
    ----------
    array : Array
        The array to send.
    update : State
        The update that the server decodes.
    residual : State
        What decoding loses of the update; empty if nothing.
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
    """Encode an update with error feedback.

    Error feedback (arXiv 1901.09847) adds what earlier encodings lost to rounding and
    selection, so that nothing is lost for good.

    Parameters
    ----------
    update : State
        One client's update, float32.
    codec : Codec
        The encoding.
    residual : Mapping[str, Tensor]
        What the client's last encoding lost, by name; missing names count as zeros.
    start : Mapping[str, Tensor]
        The state that the client received, with a frozen A if there is one.
    importance : str
        `magnitude` or `product`: how to select the values if only a share is sent.
    stream : numpy.random.Philox
        Source of stochastic rounding.
    clip_norm : float
        Bound on the norm of what is encoded, 0 for none. What clipping removes is not
        kept: it would return round after round.
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
