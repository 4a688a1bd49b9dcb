"""The base that a phase's adapter stands on, and who has which version of it."""

from collections.abc import Callable
from hashlib import blake2b

import torch
from flwr.app import Array

from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.common.tensors import State
from slora_flwr.planning.holdings import Holdings
from slora_flwr.runs.snapshot import Snapshot, to_bytes, to_tensor
from slora_flwr.wire.codec import Codec, add, subtract
from slora_flwr.wire.messages import Parcel
from slora_flwr.wire.packing import pack, unpack


class Base:
    """Versions of a base: the phase's start, then one after each round that moves it.

    Versions are named by a digest of the start and of all moves, so that whoever has
    one knows it, however it came by it.

    Parameters
    ----------
    patch : BaseWeights or None
        The start; None, or one that is empty, for W_0.
    size : int
        Bytes of all target matrices: what more moves than that would cost.
    weights : Callable
        Packs the target matrices of the current version.
    codec : Codec
        How the start travels. The base is what is read of it, on the server too.
    reference : State
        What a node knows of the start, see `Broadcast`.
    """

    def __init__(
        self,
        patch: BaseWeights | None,
        size: int,
        weights: Callable[[], Array],
        codec: Codec,
        reference: State,
    ) -> None:
        state = patch.state() if patch is not None else {}
        self._start = codec.encode(subtract(state, reference)) if state else None
        if patch is not None and self._start is not None:
            shapes = {name: tensor.shape for name, tensor in state.items()}
            read = add(codec.decode(self._start, shapes), reference)
            patch = BaseWeights.from_state(read, patch.positions, patch.scaling)
        self.patch = patch
        self._digests = [_digest(self._start.data) if self._start else ""]
        self._moves: list[Array] = []
        self._weights = weights
        start = len(self._start.data) if self._start else 0
        # Messages go to nodes; the ledger counts clients as if each were one.
        self.nodes, self.clients = Holdings(start, size), Holdings(start, size)

    @property
    def digest(self) -> str:
        """Names the current version; empty for W_0."""
        return self._digests[-1]

    def move(self, move: Array) -> None:
        """Go on to the next version."""
        self._digests.append(_digest(self.digest.encode(), move.data))
        self._moves.append(move)
        for holdings in (self.nodes, self.clients):
            holdings.moves.append(len(move.data))
        for version in range(len(self._moves)):
            if self.nodes.is_whole(version):
                self._moves[version] = _NO_MOVE  # nobody will be sent it

    def parcel(self, node: int, *, anew: bool = False) -> Parcel:
        """Give what a node lacks, and note that it gets it.

        Parameters
        ----------
        node : int
            The node's id.
        anew : bool
            It lost what it had.
        """
        version = self.nodes.update(node)
        if anew:
            version = None
        if self.nodes.is_whole(version):
            return Parcel(weights=self._weights())
        start = self._start if version is None else None
        begun = version or 0
        return Parcel(self._digests[begun], begun, start, self._moves[begun:])

    def snapshot(self) -> Snapshot:
        """Give what `restore` takes: all but the weights of the current version."""
        moves = {f"{i}": _values(move) for i, move in enumerate(self._moves)}
        patch = Snapshot()
        if self.patch is not None and self._start is not None:
            start, positions = self._start, self.patch.positions
            facts = {"array": [start.dtype, start.shape, start.stype]}
            patch = Snapshot.join(
                {
                    "start": Snapshot(facts, {"": to_tensor(start.data)}),
                    "state": Snapshot(tensors=self.patch.state()),
                    "positions": Snapshot(
                        {"scaling": self.patch.scaling},
                        {name: torch.from_numpy(p) for name, p in positions.items()},
                    ),
                }
            )
        return Snapshot.join(
            {
                "versions": Snapshot({"digests": self._digests}, moves),
                "patch": patch,
                "nodes": self.nodes.snapshot(),
                "clients": self.clients.snapshot(),
            }
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from there, on a base made for W_0."""
        versions, patch = snapshot.part("versions"), snapshot.part("patch")
        self._digests = versions.facts["digests"]
        self._moves = [pack({"": values}) for values in versions.tensors.values()]
        self.nodes.restore(snapshot.part("nodes"))
        self.clients.restore(snapshot.part("clients"))
        if patch.facts:
            start, positions = patch.part("start"), patch.part("positions")
            dtype, shape, stype = start.facts["array"]
            self._start = Array(dtype, tuple(shape), stype, to_bytes(start.tensors[""]))
            self.patch = BaseWeights.from_state(
                patch.part("state").tensors,
                {name: at.numpy() for name, at in positions.tensors.items()},
                positions.facts["scaling"],
            )


_NO_MOVE = pack({})


def _values(move: Array) -> torch.Tensor:
    return unpack(move, {"": move.shape})[""]


def _digest(*parts: bytes) -> str:
    return blake2b(b"".join(parts), digest_size=16).hexdigest()
