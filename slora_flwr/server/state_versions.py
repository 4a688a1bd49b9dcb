"""The state that a round sends, as its clients read it, and who has which version."""

from collections.abc import Iterable

from flwr.app import Array

from slora_flwr.common.tensors import State
from slora_flwr.runs.snapshot import Snapshot, to_bytes, to_tensor
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.state_channel import name_version, write_state


class StateVersions:
    """A phase's states on their way down.

    All clients of a round start from the same values, whatever each had before: a
    difference is exact. So the result of a run does not depend on who shares a node.

    Parameters
    ----------
    codec : Codec
        How states travel.
    reference : State
        What both sides know without a message, see `slora_flwr.wire.state_channel`;
        empty if the codec is exact.
    """

    def __init__(self, codec: Codec, reference: State) -> None:
        self._codec, self._reference = codec, reference
        # The bytes of the last version and of the one before, by digest.
        self._written: dict[str, bytes] = {}
        self._digest = ""
        self._arrays: dict[str, Array] = {}
        self._values = 0
        # Messages go to nodes; the ledger counts clients as if each were one.
        self._nodes: dict[int, str] = {}
        self._clients: dict[int, str] = {}
        # Nodes that did not keep a state, as where no process outlives a message.
        self._forgetful: set[int] = set()

    def publish(self, state: State) -> State:
        """Make a state the one that is sent; return what its readers start from."""
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
        """Return what a node is sent, and the digest of the version it is to have.

        Parameters
        ----------
        node : int
            The node's id.
        anew : bool
            It lost what it had: it is sent all from now on.
        """
        if anew:
            self._forgetful.add(node)
        known = self._nodes.get(node) if node not in self._forgetful else None
        since = self._since(known)
        return self._array(since), since

    def bytes_due(self, clients: Iterable[int]) -> int:
        """Count the bytes that clients are sent, each as if it were a node."""
        return sum(
            len(self._array(self._since(self._clients.get(client))).data)
            for client in clients
        )

    def received(self, node: int, clients: Iterable[int]) -> None:
        """Note that a node has the version sent last, and so each of its clients."""
        if self._codec.lossless:
            self._nodes[node] = self._digest
            self._clients |= dict.fromkeys(clients, self._digest)

    def snapshot(self) -> Snapshot:
        """Return what `restore` takes."""
        facts = {
            "digest": self._digest,
            "values": self._values,
            "clients": [*self._clients.items()],
        }
        return Snapshot(facts, {d: to_tensor(w) for d, w in self._written.items()})

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from there."""
        facts = snapshot.facts
        self._written = {d: to_bytes(t) for d, t in snapshot.tensors.items()}
        self._digest, self._values = facts["digest"], facts["values"]
        # Nodes are sent all at first: their processes need not be those of before.
        self._clients = dict(facts["clients"])
        if self._digest:
            sealed = self._codec.seal(self._written[self._digest], self._values)
            self._arrays = {"": sealed}

    def _since(self, version: str | None) -> str:
        """Return the version to send the difference to, if there is one and it pays."""
        if version is None or version not in self._written:
            return ""
        difference, whole = self._array(version), self._array("")
        return version if len(difference.data) < len(whole.data) else ""

    def _array(self, since: str) -> Array:
        if since not in self._arrays:
            data, known = self._written[self._digest], self._written[since]
            self._arrays[since] = self._codec.seal(data, self._values, known)
        return self._arrays[since]
