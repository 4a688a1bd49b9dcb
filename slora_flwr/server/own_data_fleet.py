"""Nodes that train on their own data: one client per node, labels agreed."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from logging import INFO, WARNING
from typing import Any, NoReturn

from flwr.common.logger import log
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from slora_flwr.common.text import clean_label, lookalikes, printable, shorten
from slora_flwr.data.node_files import LONGEST_LABEL, MOST_LABELS
from slora_flwr.runs.events import NodeJoined
from slora_flwr.server.fleet import MOST_EXAMPLES, Fleet, FleetError

# An honest node has five reasons to skip a row.
MOST_REASONS = 20
# How owners begin that are public keys.
KEY = "key "


@dataclass(frozen=True)
class Owner:
    """Whose a name is.

    Attributes
    ----------
    key : str
        Digest of the node's public key, or its id where Flower gives no key.
    is_registered : bool
        Whether the SuperLink's operator registered the key under this name.
    """

    key: str
    is_registered: bool


NOBODY = Owner("", False)


@dataclass(frozen=True)
class Description:
    """A node's description of its own data: counts and label names, no examples."""

    name: str
    client: int | None
    labels: dict[str, int]
    skipped: dict[str, int]

    @classmethod
    def read(
        cls, described: Mapping[str, Any], metrics: Mapping[str, Any]
    ) -> "Description":
        """Return the description in a node's records.

        Raises
        ------
        ValueError
            If an entry is missing or invalid.
        """
        try:
            counts = list(metrics["examples"])
            labels = dict(zip(described["labels"], counts, strict=True))
            skipped = dict(
                zip(
                    described.get("skipped", []),
                    metrics.get("skipped", []),
                    strict=True,
                )
            )
            client = described.get("client")
            name = printable(described["name"], LONGEST_LABEL)
            if len(skipped) > MOST_REASONS:
                raise ValueError(f"it skips rows for {len(skipped)} reasons")
            skipped = {printable(reason): n for reason, n in skipped.items()}
            found = cls(name, client, labels, skipped)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"its description is off: {error!r}") from error
        numbers = [*labels.values(), *skipped.values(), 0 if client is None else client]
        if (
            not all(type(n) is int and n >= 0 for n in numbers)
            or not all(type(text) is str for text in (*labels, *skipped))
            or not all(labels)
            # Labels that an honest node would not send.
            or not 0 < len(labels) <= MOST_LABELS
            or max(map(len, labels)) > LONGEST_LABEL
            or max(sum(labels.values()), *skipped.values(), 0) > MOST_EXAMPLES
        ):
            raise ValueError(f"its description is off: {found}")
        for label in labels:
            if label != clean_label(label):
                raise ValueError(
                    f"its label is {label!a}; allowed: labels without control and "
                    "invisible characters, and without blanks at the ends"
                )
        return found


class OwnDataFleet(Fleet):
    """A fleet whose nodes agree on the labels before the first round.

    A name, and the client number that goes with it, belong to the key that the
    SuperLink's operator registered under it, or else to the first that had it. Another
    key is refused. Only while the owner is gone, and if the name is not registered, may
    another node have it: without node authentication a node has a new key each time it
    starts. The owner gets it back when it returns.

    Parameters
    ----------
    expected, min_nodes, deadline
        As in `Fleet`.
    labels : Iterable[str]
        The label names. If empty, those of all nodes that answer the first query, and
        `also`. A node's examples with other labels are left out.
    also : Iterable[str]
        Label names of the server's test data.
    min_examples : int
        A node with fewer examples of these labels is left out.
    """

    def __init__(
        self,
        expected: Mapping[str, object],
        min_nodes: int,
        deadline: float,
        *,
        labels: Iterable[str] = (),
        also: Iterable[str] = (),
        min_examples: int = 1,
    ) -> None:
        super().__init__(expected, min_nodes, deadline)
        self.classes = sorted(labels)
        self._also = set(also)
        self._min_examples = min_examples
        self._described: dict[int, Description] = {}
        self._clients: dict[str, int] = {}
        self._owners: dict[str, Owner] = {}
        # The key of each node online, and the name that it is registered under.
        self._keys: dict[int, str] = {}
        self._registered: dict[int, str] = {}
        # Nodes refused because of others, each with the other.
        self._refused: dict[int, int] = {}
        self._settled = False

    def agreed(self) -> dict[str, Any]:
        """Return the label names, and the client and the owner of each node's name."""
        # Ids of nodes may be others' in the next Flower run; keys may not.
        owners = {
            name: asdict(owner)
            for name, owner in self._owners.items()
            if owner.key.startswith(KEY)
        }
        return {"classes": self.classes, "clients": self._clients, "owners": owners}

    def restore(self, agreed: Mapping[str, Any]) -> None:
        """Restore the label names, client numbers and owners of names."""
        self.classes, self._clients = agreed["classes"], dict(agreed["clients"])
        owners = agreed.get("owners", {})
        self._owners = {name: Owner(**owner) for name, owner in owners.items()}

    def name(self, node: int) -> str:
        """Return the name under which a node is registered, or its own, and its id."""
        found = self._described.get(node)
        return f"{found.name} (node {node})" if found else super().name(node)

    def _admit(
        self, node: int, described: Mapping[str, Any], metrics: Mapping[str, Any]
    ) -> None:
        found = Description.read(described, metrics)
        name = self._registered.get(node) or found.name
        self._described[node] = replace(found, name=name)
        if self._settled:
            self._place(node)

    def _identify(self, infos: Iterable[NodeInfo]) -> None:
        for info in infos:
            digest = blake2b(info.public_key, digest_size=16).hexdigest()
            known = f"{KEY}{digest}" if info.public_key else f"node {info.node_id}"
            self._keys[info.node_id] = known
            self._registered[info.node_id] = printable(info.name, LONGEST_LABEL)

    def _refresh(self, grid: Grid) -> None:
        super()._refresh(grid)
        for node, holder in list(self._refused.items()):
            if node in self._present and holder not in self._present:
                del self._refused[node]
                self.left_out.pop(node, None)
                self._try_to_place(node)

    def forget(self, node: int) -> None:
        """Exclude a node until it answers another query."""
        super().forget(node)
        self._refused.pop(node, None)

    def _settle(self) -> None:
        there = {n: d for n, d in self._described.items() if n not in self.left_out}
        if not self.classes:
            self.classes = self._unite(there)
        if there and len(self.classes) < 2:
            raise FleetError(
                f"the nodes' labels are {self.classes}; at least two are needed"
            )
        shown = printable(", ".join(self.classes))
        log(INFO, "%d labels agreed: %s", len(self.classes), shown)
        for alike in lookalikes(self.classes):
            names = printable(", ".join(alike))
            log(WARNING, "labels that look alike are different classes: %s", names)
        self._settled = True
        # In order of names, after the nodes that chose their client numbers.
        order = sorted((d.client is None, d.name, n) for n, d in there.items())
        # Names' owners go before them.
        for _, _, node in sorted(order, key=lambda of: not self._owns(of[2], of[1])):
            self._try_to_place(node)

    def _try_to_place(self, node: int) -> None:
        try:
            self._place(node)
        except ValueError as error:
            self._leave_out(node, str(error))

    def _identity(self, node: int) -> Owner:
        return Owner(self._keys[node], bool(self._registered[node]))

    def _owns(self, node: int, name: str) -> bool:
        """Return whether a name is a node's, or will be as soon as it asks for it."""
        owner, mine = self._owners.get(name, NOBODY), self._identity(node)
        return owner.key == mine.key or mine.is_registered > owner.is_registered

    def _check_owner(self, node: int, name: str, what: str) -> None:
        """Refuse a node what goes with a name that is another's.

        Raises
        ------
        ValueError
            If the name's owner is online, or is registered and the node is not.
        """
        if name not in self._owners or self._owns(node, name):
            return
        owner = self._owners[name]
        for other in self._present:
            if self._keys[other] == owner.key:
                self._refuse(node, other, what)
        if owner.is_registered and not self._registered[node]:
            raise ValueError(f"{what} is that of a registered node")

    def _refuse(self, node: int, other: int, what: str) -> NoReturn:
        """Refuse a node what another has, for as long as that is online."""
        self._refused[node] = other
        raise ValueError(f"{what} is that of {self.name(other)}")

    def _unite(self, there: dict[int, Description]) -> list[str]:
        """Return all labels; leave out who has the most while they are too many."""
        while True:
            found = self._also.union(*(told.labels for told in there.values()))
            if len(found) <= MOST_LABELS or not there:
                return sorted(found)
            node = max(there, key=lambda n: (len(there[n].labels), n))
            self._leave_out(
                node,
                f"it has {len(there[node].labels)} labels, the most of all, and the "
                f"nodes have {len(found)} together; allowed: {MOST_LABELS}",
            )
            del there[node]

    def _place(self, node: int) -> None:
        """Assign a node its client if its data qualifies.

        Raises
        ------
        ValueError
            With the reason why the node cannot take part.
        """
        described = self._described[node]
        known = {n: c for n, c in described.labels.items() if n in self.classes}
        others = sorted(described.labels.keys() - known.keys())
        skipped = dict(described.skipped)
        if others:
            skipped["unknown label"] = sum(described.labels[name] for name in others)
        usable = sum(known.values())
        told = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "none"
        if usable < self._min_examples:
            raise ValueError(
                f"it has {usable} usable examples, clients.min-examples is "
                f"{self._min_examples}; rows skipped: {told}"
            )
        name, client = described.name, described.client
        self._check_owner(node, name, f"the name {name}")
        if name not in self._owners or self._identity(node).is_registered:
            self._owners[name] = self._identity(node)
        if client is None:
            client = self._clients.get(name)
        if client is None:
            client = next(i for i in range(len(self._clients) + 1) if self._is_free(i))
        names = [n for n, c in self._clients.items() if c == client]
        for other_name in names:
            self._check_owner(node, other_name, f"client {client}")
        is_own = any(self._owns(node, n) for n in names)
        for other in self._online:
            if other != node and client in self._hosted[other]:
                if not is_own:
                    self._refuse(node, other, f"client {client}")
                super().forget(other)
                self._refused[other] = node
                reason = f"client {client} is that of {self.name(node)}, which is back"
                self._leave_out(other, reason)
        self._clients[described.name] = client
        self._host(node, frozenset({client}), {client: usable})
        log(
            INFO,
            "%s is client %d: %d examples; rows skipped: %s%s",
            self.name(node),
            client,
            usable,
            told,
            f"; unknown labels: {printable(', '.join(others))}" if others else "",
        )
        self._tell(
            NodeJoined(
                node=node,
                name=described.name,
                client=client,
                examples=usable,
                skipped=skipped,
                unknown_labels=shorten(others),
            )
        )

    def _is_free(self, client: int) -> bool:
        return client not in self._clients.values()
