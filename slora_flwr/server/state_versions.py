"""The states that a phase sends, and which node has which version."""

from collections.abc import Iterable

from flwr.app import Array

from slora_flwr.common.tensors import State
from slora_flwr.runs.snapshot import Snapshot, to_bytes, to_tensor
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.state_channel import name_version, write_state


class StateVersions:
    """Versions of a phase's state, each coded for what a node already has.

    Differences between versions are exact. So all clients of a round start from the
    same values, and the result of a run does not depend on which clients share a node.

    Parameters
    ----------
    codec : Codec
        Codec of the states.
    reference : State
        Values both sides already know, see `slora_flwr.wire.state_channel`; empty if
        the codec is exact.
    """

    def __init__(self, codec: Codec, reference: State) -> None:
        self._codec, self._reference = codec, reference
        # The bytes of the last version and of the one before, by digest.
        self._written: dict[str, bytes] = {}
        self._digest = ""
        self._arrays: dict[str, Array] = {}
        self._values = 0
        # Messages go to nodes; the ledger counts each client as if it were a node.
        self._nodes: dict[int, str] = {}
        self._clients: dict[int, str] = {}
        # Nodes that lost a state, as where no process outlives a message.
        self._forgetful: set[int] = set()

    def publish(self, state: State) -> State:
        """Publish a state; return it as clients decode it."""
        codec = self._codec
        self._values = sum(tensor.numel() for tensor in state.values())
        if codec.is_plain:
            self._arrays = {"": codec.encode(state)}
            return state
        data, read = write_state(state, codec, self._reference)
        digest = name_version(data)
        if digest != self._digest:
            before = self._written.get(self._digest)
            self._written = {} if before is None else {self._digest: before}
            self._written[digest] = data
            self._digest = digest
            self._arrays = {"": codec.seal(data, self._values)}
        return read

    def encode_for(self, node: int, *, anew: bool = False) -> tuple[Array, str]:
        """Return a node's coded state, and the version that it is a difference from.

        Parameters
        ----------
        node : int
            The node's id.
        anew : bool
            True if the node lost its version; it then always gets whole states.
        """
        if anew:
            self._forgetful.add(node)
        known = self._nodes.get(node) if node not in self._forgetful else None
        since = self._since(known)
        return self._array(since), since

    def bytes_due(self, clients: Iterable[int]) -> int:
        """Return the bytes to send to clients, each as if it were a separate node."""
        return sum(
            len(self._array(self._since(self._clients.get(client))).data)
            for client in clients
        )

    def received(self, node: int, clients: Iterable[int]) -> None:
        """Record that a node and its clients have the latest version."""
        if self._codec.lossless:
            self._nodes[node] = self._digest
            self._clients |= dict.fromkeys(clients, self._digest)

    def snapshot(self) -> Snapshot:
        """Return a snapshot for `restore`."""
        facts = {
            "digest": self._digest,
            "values": self._values,
            "clients": [*self._clients.items()],
        }
        return Snapshot(facts, {d: to_tensor(w) for d, w in self._written.items()})

    def restore(self, snapshot: Snapshot) -> None:
        """Restore a snapshot."""
        facts = snapshot.facts
        self._written = {d: to_bytes(t) for d, t in snapshot.tensors.items()}
        self._digest, self._values = facts["digest"], facts["values"]
        # Nodes first get whole states, since their processes may have been replaced.
        self._clients = dict(facts["clients"])
        if self._digest:
            sealed = self._codec.seal(self._written[self._digest], self._values)
            self._arrays = {"": sealed}

    def _since(self, version: str | None) -> str:
        """Return the version to send a difference from; empty to send the whole."""
        if version is None or version not in self._written:
            return ""
        difference, whole = self._array(version), self._array("")
        return version if len(difference.data) < len(whole.data) else ""

    def _array(self, since: str) -> Array:
        if since not in self._arrays:
            data, known = self._written[self._digest], self._written[since]
            self._arrays[since] = self._codec.seal(data, self._values, known)
        return self._arrays[since]
