"""The channel of states between server and nodes: each write beside its read.

The server writes to a node, and the node reads,

    the state       whole, or as the difference from a version that the node has
    its slices      instead, if clients have factors of different ranks
    the base        from which a phase starts
    its changes     one for each round that changed it
    its matrices    instead, if they cost less than the changes

and the node writes back, and the server reads,

    the update      of a single client, encoded
    the sums        of several clients' updates, exact
    the updates     of several clients, encoded, if that takes fewer bytes than their
                    sums, or if the aggregator needs each

Names and shapes are not sent: both sides know them from the phase. Nor are the values
of a `reference`, which both sides know too: state and base are sent as differences from
it. The functions here keep nothing; `slora_flwr.server` and `slora_flwr.client` keep
who has which version.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
from flwr.app import Array
from numpy.typing import NDArray
from torch import Size, Tensor

from slora_flwr.adapters.low_rank import fill_slices, rank_shapes, take_slices
from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.common.tensors import State
from slora_flwr.wire.base_codec import BaseCodec, split_base
from slora_flwr.wire.clipping import clip, norm
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.grid import Grid
from slora_flwr.wire.integers import decode_integers, encode_integers
from slora_flwr.wire.packing import (
    check_kind,
    count_values,
    flatten,
    join,
    pack,
    split,
    unflatten,
    unpack,
)
from slora_flwr.wire.selection import choose, weigh_by_product

Layout = Mapping[str, Sequence[int]]

BASE, SUMS, UPDATES = "slora.base", "slora.sums", "slora.updates"


def name_version(*parts: bytes) -> str:
    """Return the name of a version of a state or base: BLAKE2b, 32 hex digits."""
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


# From the server to a node


def write_state(state: State, codec: Codec, reference: State) -> tuple[bytes, State]:
    """Return a version of the state as bytes, and what every node reads of them.

    `Codec.seal` makes the array for a node, given an earlier version that it has.
    """
    data = codec.write(_subtract(state, reference))
    shapes = {name: tensor.shape for name, tensor in state.items()}
    return data, _add(codec.read(data, shapes), reference)


def read_state(
    array: Array, shapes: Layout, codec: Codec, reference: State, known: bytes = b""
) -> tuple[State, bytes]:
    """Return the state in an array, and the version's bytes.

    The bytes are empty if no difference from them can follow.

    Parameters
    ----------
    array : Array
        The array that was sent.
    shapes : Layout
        The layout of what is sent of the state.
    codec : Codec
        The encoding of states.
    reference : State
        Values that both sides know.
    known : bytes
        The version from which the array is a difference; empty if it is whole.
    """
    if not codec.lossless:
        return _add(codec.decode(array, shapes), reference), b""
    data = codec.open(array, count_values(shapes), known)
    return _add(codec.read(data, shapes), reference), data


def write_slices(state: State, rank: int) -> Array:
    """Return the array of a state whose factors are cut to a node's largest rank."""
    return pack(take_slices(state, rank))


def read_slices(array: Array, shapes: Layout, rank: int) -> State:
    """Return the state in it, with zeros for the slices that were not sent."""
    return fill_slices(unpack(array, rank_shapes(shapes, rank)), shapes)


def write_base(base: BaseWeights, codec: BaseCodec, reference: State) -> Array:
    """Return the array of the base from which a phase starts."""
    values, factors = split_base(base.state())
    if not codec.values.is_exact:
        values = _subtract(values, reference)
    known = _known_values(values, codec, reference)
    parts = codec.values.encode(values, known=known), codec.factors.encode(factors)
    data = join([part.data for part in parts])
    return Array("uint8", (len(data),), BASE, data)


def read_base(
    data: bytes,
    shapes: Layout,
    positions: dict[str, NDArray[np.int64]],
    scaling: float,
    codec: BaseCodec,
    reference: State,
) -> BaseWeights:
    """Return the base in an array's bytes, which a node may have kept.

    Parameters
    ----------
    data : bytes
        The bytes.
    shapes, positions, scaling
        As `Adapter.base_layout` returns them.
    codec : BaseCodec
        The encoding of bases.
    reference : State
        Values that both sides know, by their names in the base's state.

    Raises
    ------
    PayloadError
        If the bytes do not hold such a base.
    """
    state: State = {}
    layouts = split_base(shapes)
    known = _known_values(layouts[0], codec, reference), b""
    for part, own, layout, earlier in zip(
        split(data, 2), (codec.values, codec.factors), layouts, known, strict=True
    ):
        array = Array(own.dtype, (count_values(layout),), own.stype, part)
        state |= own.decode(array, layout, earlier)
    if not codec.values.is_exact:
        state = _add(state, reference)
    return BaseWeights.from_state(state, positions, scaling)


def _known_values(names: Iterable[str], codec: BaseCodec, reference: State) -> bytes:
    """Return the values that both sides know, if differences from them are exact."""
    known = {name: reference[name] for name in names if name in reference}
    return codec.values.write(known) if known and codec.values.is_exact else b""


def write_change(change: State) -> Array:
    """Return the array of a round's change of the base."""
    return pack(change)


def read_change(array: Array, layout: Callable[[int], Mapping[str, Size]]) -> State:
    """Return the change in it; `layout` returns the shapes of so many values."""
    return unpack(array, layout(len(array.data) // 4))


def write_weights(weights: State) -> Array:
    """Return the array of the base's target matrices."""
    return pack(weights)


def read_weights(array: Array, shapes: Layout) -> BaseWeights:
    """Return the base in it."""
    return BaseWeights(weights=unpack(array, shapes))


# From a node to the server


@dataclass(frozen=True)
class Upload:
    """An encoded update.

    Attributes
    ----------
    array : Array
        The array to send.
    update : State
        The update that the server reads, with zeros beyond the client's rank; empty if
        nobody is to read it.
    norm : float
        Its norm before it was clipped; 0 if it was not to be.
    residual : State
        What the server does not read of the update; empty if it reads all.
    """

    array: Array
    update: State
    norm: float = 0.0
    residual: State = field(default_factory=dict)


def write_update(
    update: State,
    codec: Codec | Grid,
    *,
    residual: Mapping[str, Tensor],
    start: State,
    importance: str,
    stream: np.random.Philox,
    clip_norm: float = 0.0,
    rank: int | None = None,
    keeps_lost: bool = True,
) -> Upload:
    """Encode one client's update with error feedback.

    Error feedback (arXiv 1901.09847) adds what earlier encodings lost to rounding and
    selection, so that nothing is lost for good.

    Parameters
    ----------
    update : State
        The update, float32.
    codec : Codec
        The encoding.
    residual : Mapping[str, Tensor]
        What the client's last encoding lost, by name; missing names count as zeros.
    start : State
        The state that the client received, with a frozen A if there is one.
    importance : str
        `magnitude` or `product`: how to select the values if only a share is sent.
    stream : numpy.random.Philox
        Source of stochastic rounding.
    clip_norm : float
        Bound on the norm of what is encoded, 0 for none. What clipping removes is not
        kept: it would return round after round.
    rank : int or None
        The client's rank, if clients have factors of different ranks.
    keeps_lost : bool
        Whether the client keeps what the encoding loses. If not, an update on a grid is
        not decoded: its fold adds up whole numbers.
    """
    shapes = {name: tensor.shape for name, tensor in update.items()}
    update, start = cut(update, rank), cut(start, rank)
    whole = {n: t + residual[n] if n in residual else t for n, t in update.items()}
    length = norm(whole) if clip_norm else 0.0
    whole = clip(whole, clip_norm)
    if codec.is_exact:
        return Upload(codec.encode(whole), fill_slices(whole, shapes), length)
    chosen = None
    if isinstance(codec, Codec) and codec.share:
        count = sum(tensor.numel() for tensor in whole.values())
        weights = {name: tensor.abs() for name, tensor in whole.items()}
        if importance == "product":
            trained = {n: t + update[n] if n in update else t for n, t in start.items()}
            weights = weigh_by_product(whole, trained)
        chosen = choose(weights, codec.parts(count), codec.head)
    array = codec.encode(whole, chosen, stream)
    if isinstance(codec, Grid) and not keeps_lost:
        return Upload(array, {}, length)
    read = read_update(array, shapes, codec, rank)
    lost = {name: tensor - read[name] for name, tensor in whole.items()}
    return Upload(array, fill_slices(read, shapes), length, lost)


def read_update(
    array: Array, shapes: Layout, codec: Codec | Grid, rank: int | None = None
) -> State:
    """Return the update in an array, its factors cut to the client's rank.

    Raises
    ------
    PayloadError
        If the array does not hold such an update.
    """
    return codec.decode(array, _cut_shapes(shapes, rank))


def write_sums(sums: State, rank: int | None = None) -> Array:
    """Return the array of exact sums, int64, cut to the clients' largest rank.

    They are written in as few bits as their magnitudes need.
    """
    values = flatten(cut(sums, rank), "int64")
    return Array("int64", (len(values),), SUMS, encode_integers(values))


def read_sums(array: Array, shapes: Layout, rank: int | None = None) -> State:
    """Return the sums in it, cut to the clients' largest rank.

    Raises
    ------
    PayloadError
        If the array does not hold such sums.
    """
    shapes = _cut_shapes(shapes, rank)
    count = count_values(shapes)
    check_kind(array, SUMS, "int64", count)
    return unflatten(decode_integers(array.data, count), shapes)


def write_updates(updates: Sequence[Array]) -> Array:
    """Return the array of several encoded updates."""
    data = join([update.data for update in updates])
    return Array(updates[0].dtype, (len(updates),), UPDATES, data)


def read_updates(
    array: Array, shapes: Layout, codec: Codec, ranks: Sequence[int | None]
) -> Iterator[State]:
    """Yield the updates in it, each cut to its client's rank.

    Raises
    ------
    PayloadError
        If the array does not hold such updates.
    """
    check_kind(array, UPDATES, codec.dtype, len(ranks))
    for data, rank in zip(split(array.data, len(ranks)), ranks, strict=True):
        count = count_values(_cut_shapes(shapes, rank))
        update = Array(codec.dtype, (count,), codec.stype, data)
        yield read_update(update, shapes, codec, rank)


def cut(state: Mapping[str, Tensor], rank: int | None) -> State:
    """Return a state with its factors cut to a rank, if there is one."""
    return dict(state) if rank is None else take_slices(state, rank)


def _cut_shapes(shapes: Layout, rank: int | None) -> Layout:
    return shapes if rank is None else rank_shapes(shapes, rank)


def _subtract(state: State, reference: State) -> State:
    """Return a state minus a reference, in which missing names count as zeros."""
    return {n: t - reference[n] if n in reference else t for n, t in state.items()}


def _add(change: State, reference: State) -> State:
    """Return a change plus a reference: the inverse, up to rounding."""
    return {n: t + reference[n] if n in reference else t for n, t in change.items()}
