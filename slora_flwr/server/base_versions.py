"""The versions of a phase's base, and which node has which."""

from collections.abc import Callable

import torch
from flwr.app import Array

from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.common.tensors import State
from slora_flwr.planning.version_bytes import VersionBytes
from slora_flwr.runs.snapshot import Snapshot, to_bytes, to_tensor
from slora_flwr.wire.base_codec import BaseCodec
from slora_flwr.wire.messages import BaseDelta
from slora_flwr.wire.packing import pack, unpack
from slora_flwr.wire.state_channel import (
    name_version,
    read_base,
    write_base,
    write_weights,
)


class BaseVersions:
    """Versions of a base: the phase's start, then one after each round's change.

    A version's name is a digest of the start and of all changes up to it, so it does
    not depend on how a node received the version.

    Parameters
    ----------
    start : BaseWeights or None
        The first version; None or empty for W_0.
    size : int
        Bytes of all target matrices, which are sent if the changes would take more.
    weights : Callable
        Returns the target matrices of the current version.
    codec : BaseCodec
        Codec of the start. The server too uses the decoded start.
    reference : State
        Values of the start that a node already knows; see `StateVersions`.

    Attributes
    ----------
    start : BaseWeights or None
        The first version as nodes decode it; None for W_0.
    """

    def __init__(
        self,
        start: BaseWeights | None,
        size: int,
        weights: Callable[[], State],
        codec: BaseCodec,
        reference: State,
    ) -> None:
        state = start.state() if start is not None else {}
        self._packed: Array | None = None
        if start is not None and state:
            self._packed = write_base(start, codec, reference)
            start = read_base(
                self._packed.data,
                {name: tensor.shape for name, tensor in state.items()},
                start.positions,
                start.scaling,
                codec,
                reference,
            )
        self.start = start
        self._digests = [name_version(self._packed.data) if self._packed else ""]
        self._changes: list[Array] = []
        self._weights = weights
        begun = len(self._packed.data) if self._packed else 0
        # Messages go to nodes; the ledger counts each client as if it were a node.
        self.nodes, self.clients = VersionBytes(begun, size), VersionBytes(begun, size)

    @property
    def digest(self) -> str:
        """Digest that names the current version; empty for W_0."""
        return self._digests[-1]

    def change(self, change: Array) -> None:
        """Append a change as the next version."""
        self._digests.append(name_version(self.digest.encode(), change.data))
        self._changes.append(change)
        for holders in (self.nodes, self.clients):
            holders.changes.append(len(change.data))
        for version in range(len(self._changes)):
            if self.nodes.is_whole(version):
                self._changes[version] = _NO_CHANGE  # never sent again

    def delta_for(self, node: int, *, anew: bool = False) -> BaseDelta:
        """Return what a node lacks, and record it as sent.

        Parameters
        ----------
        node : int
            The node's id.
        anew : bool
            True if the node lost the version that it had.
        """
        version = self.nodes.update(node)
        if anew:
            version = None
        if self.nodes.is_whole(version):
            return BaseDelta(weights=write_weights(self._weights()))
        start = self._packed if version is None else None
        begun = version or 0
        return BaseDelta(self._digests[begun], begun, start, self._changes[begun:])

    def snapshot(self) -> Snapshot:
        """Return a snapshot for `restore`, without the current version's weights."""
        changes = {f"{i}": _values(change) for i, change in enumerate(self._changes)}
        start = Snapshot()
        if self.start is not None and self._packed is not None:
            packed, positions = self._packed, self.start.positions
            facts = {"array": [packed.dtype, packed.shape, packed.stype]}
            start = Snapshot.join(
                {
                    "packed": Snapshot(facts, {"": to_tensor(packed.data)}),
                    "state": Snapshot(tensors=self.start.state()),
                    "positions": Snapshot(
                        {"scaling": self.start.scaling},
                        {name: torch.from_numpy(p) for name, p in positions.items()},
                    ),
                }
            )
        return Snapshot.join(
            {
                "versions": Snapshot({"digests": self._digests}, changes),
                "start": start,
                "nodes": self.nodes.snapshot(),
                "clients": self.clients.snapshot(),
            }
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Restore a snapshot; these versions must have been made for W_0."""
        versions, start = snapshot.part("versions"), snapshot.part("start")
        self._digests = versions.facts["digests"]
        self._changes = [pack({"": values}) for values in versions.tensors.values()]
        self.nodes.restore(snapshot.part("nodes"))
        self.clients.restore(snapshot.part("clients"))
        if start.facts:
            packed, positions = start.part("packed"), start.part("positions")
            dtype, shape, stype = packed.facts["array"]
            data = to_bytes(packed.tensors[""])
            self._packed = Array(dtype, tuple(shape), stype, data)
            self.start = BaseWeights.from_state(
                start.part("state").tensors,
                {name: at.numpy() for name, at in positions.tensors.items()},
                positions.facts["scaling"],
            )


_NO_CHANGE = pack({})


def _values(change: Array) -> torch.Tensor:
    return unpack(change, {"": change.shape})[""]
