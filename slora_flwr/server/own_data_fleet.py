"""Nodes that train on their own data: one client per node, labels agreed if any."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from itertools import count
from logging import INFO, WARNING
from typing import Any, NoReturn

from flwr.common.logger import log
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from slora_flwr.common.text import (
    clean_label,
    counted,
    default_name,
    lookalikes,
    printable,
    shorten,
)
from slora_flwr.data.node_files import LONGEST_LABEL, MOST_LABELS
from slora_flwr.runs.events import NodeJoined
from slora_flwr.server.fleet import MOST_EXAMPLES, Fleet, FleetError

# An honest node has five reasons to skip a row.
MOST_REASONS = 20
# How owners begin that are public keys.
KEY = "key "


@dataclass(frozen=True)
class Owner:
    """Whose a name or a client number is.

    Attributes
    ----------
    key : str
        Digest of the node's public key, or its id where Flower gives no key.
    is_registered : bool
        Whether the SuperLink's operator registered the key under a name.
    """

    key: str
    is_registered: bool


NOBODY = Owner("", False)


@dataclass(frozen=True)
class Description:
    """A node's description of its own data: counts and label names, no examples.

    `labels` is empty if the task has none.
    """

    name: str
    client: int | None
    examples: int
    labels: dict[str, int]
    skipped: dict[str, int]

    @classmethod
    def read(
        cls,
        described: Mapping[str, Any],
        metrics: Mapping[str, Any],
        *,
        has_classes: bool = True,
    ) -> "Description":
        """Return the description in a node's records.

        Parameters
        ----------
        described, metrics : Mapping[str, Any]
            The records, unchecked.
        has_classes : bool
            Whether it names labels.

        Raises
        ------
        ValueError
            If an entry is missing or invalid.
        """
        try:
            counts = list(metrics["examples"])
            labels = {}
            if has_classes:
                labels = dict(zip(described["labels"], counts, strict=True))
            elif len(counts) != 1 or "labels" in described:
                raise ValueError("it tells labels, which the task has none of")
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
            found = cls(name, client, sum(counts), labels, skipped)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"its description is off: {error!r}") from error
        numbers = [*counts, *skipped.values(), 0 if client is None else client]
        if (
            not all(type(n) is int and n >= 0 for n in numbers)
            or not all(type(text) is str for text in (*labels, *skipped))
            or not all(labels)
            # Labels that an honest node would not send.
            or not has_classes <= len(labels) <= MOST_LABELS
            or max(map(len, labels), default=0) > LONGEST_LABEL
            or max(found.examples, *skipped.values(), 0) > MOST_EXAMPLES
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

    A name belongs to the key that the SuperLink's operator registered under it, or else
    to the first that had it; so does a client number, of which a key has one at a time.
    Another key is refused. Only while the owner is gone, and if it is not registered,
    may another node have them: without node authentication a node has a new key each
    time it starts. The owner gets them back when it returns.

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
    has_classes : bool
        Whether nodes tell labels. Without, `labels` are all that there are.
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
        has_classes: bool = True,
    ) -> None:
        super().__init__(expected, min_nodes, deadline)
        self.classes = sorted(labels)
        self._also, self._has_classes = set(also), has_classes
        self._min_examples = min_examples
        self._described: dict[int, Description] = {}
        self._clients: dict[str, int] = {}
        self._owners: dict[str, Owner] = {}
        self._numbers: dict[int, Owner] = {}
        # The key of each node online.
        self._keys: dict[int, str] = {}
        # Nodes refused because of others, each with the other, and with the number that
        # the other has; None if it is the name.
        self._refused: dict[int, tuple[int, int | None]] = {}
        self._settled = False

    def agreed(self) -> dict[str, Any]:
        """Return the labels, names' clients, and the owners of names and numbers."""
        return {
            "classes": self.classes,
            "clients": self._clients,
            "owners": _lasting(self._owners),
            "numbers": _lasting(self._numbers),
        }

    def restore(self, agreed: Mapping[str, Any]) -> None:
        """Restore what the nodes agreed on."""
        self.classes, self._clients = agreed["classes"], dict(agreed["clients"])
        self._owners = {name: Owner(**owner) for name, owner in agreed["owners"]}
        self._numbers = {client: Owner(**owner) for client, owner in agreed["numbers"]}

    def name(self, node: int) -> str:
        """Return the name under which a node is registered, or its own, and its id.

        A node that is named by its client's number, and has that client, needs no id.
        """
        found = self._described.get(node)
        if found is None or found.name == default_name(node):
            return super().name(node)
        if found.client is None or found.name != default_name(found.client):
            return f"{found.name} (node {node})"
        hosted = self._hosted.get(node, ())
        return found.name if found.client in hosted else f"{found.name} (id {node})"

    def _admit(
        self, node: int, described: Mapping[str, Any], metrics: Mapping[str, Any]
    ) -> None:
        has_classes = self._has_classes
        found = Description.read(described, metrics, has_classes=has_classes)
        name = self._registered.get(node) or found.name
        self._described[node] = replace(found, name=name)
        if self._settled:
            self._place(node)

    def _identify(self, infos: list[NodeInfo]) -> None:
        super()._identify(infos)
        for info in infos:
            digest = blake2b(info.public_key, digest_size=16).hexdigest()
            known = f"{KEY}{digest}" if info.public_key else f"node {info.node_id}"
            self._keys[info.node_id] = known

    def _refresh(self, grid: Grid) -> None:
        super()._refresh(grid)
        for node, (holder, client) in list(self._refused.items()):
            is_there = holder in self._present and self._has(holder, client)
            if node in self._present and not is_there:
                del self._refused[node]
                self.left_out.pop(node, None)
                self._try_to_place(node)

    def _has(self, holder: int, client: int | None) -> bool:
        """Return whether a node still has the number for which another was refused."""
        if client is None or client in self._hosted.get(holder, {client}):
            return True
        return self._numbers.get(client, NOBODY).key == self._keys[holder]

    def forget(self, node: int) -> None:
        """Exclude a node until it answers another query."""
        super().forget(node)
        self._refused.pop(node, None)

    def _settle(self) -> None:
        there = {n: d for n, d in self._described.items() if n not in self.left_out}
        if self._has_classes:
            self._agree(there)
        self._settled = True
        # In order of names, after the nodes that chose their client numbers.
        order = sorted((d.client is None, d.name, n) for n, d in there.items())
        # Names' owners go before them.
        for _, _, node in sorted(
            order, key=lambda of: not self._owns(of[2], self._owners.get(of[1], NOBODY))
        ):
            self._try_to_place(node)

    def _agree(self, there: dict[int, Description]) -> None:
        """Make the classes the labels of all, unless they are given."""
        if not self.classes:
            self.classes = self._unite(there)
        if there and len(self.classes) < 2:
            raise FleetError(
                f"the nodes' labels are {self.classes}; at least two are needed"
            )
        shown = printable(", ".join(self.classes))
        log(INFO, "%s agreed: %s", counted(len(self.classes), "label"), shown)
        for alike in lookalikes(self.classes):
            names = printable(", ".join(alike))
            log(WARNING, "labels that look alike are different classes: %s", names)

    def _try_to_place(self, node: int) -> None:
        try:
            self._place(node)
        except ValueError as error:
            self._leave_out(node, str(error))

    def _identity(self, node: int) -> Owner:
        return Owner(self._keys[node], bool(self._registered[node]))

    def _owns(self, node: int, owner: Owner) -> bool:
        """Return whether a node is an owner, or goes before it."""
        mine = self._identity(node)
        return owner.key == mine.key or mine.is_registered > owner.is_registered

    def _check_owner(
        self, node: int, owner: Owner, what: str, client: int | None = None
    ) -> None:
        """Refuse a node what is another's.

        Raises
        ------
        ValueError
            If the owner is online, or is registered and the node is not.
        """
        if owner == NOBODY or self._owns(node, owner):
            return
        for other in self._present:
            if self._keys[other] == owner.key:
                self._refuse(node, other, what, client)
        if owner.is_registered and not self._registered[node]:
            raise ValueError(f"{what} is that of a registered node")

    def _refuse(
        self, node: int, other: int, what: str, client: int | None = None
    ) -> NoReturn:
        """Refuse a node what another has, for as long as that is online and has it."""
        self._refused[node] = other, client
        raise ValueError(f"{what} is that of {self.name(other)}")

    def _take_name(self, node: int, name: str) -> None:
        """Make a node the owner of a name that has none, or that it is registered by.

        Raises
        ------
        ValueError
            If the name is another's.
        """
        before, mine = self._owners.get(name, NOBODY), self._identity(node)
        self._check_owner(node, before, f"the name {name}")
        if not mine.is_registered and name in self._registered.values():
            raise ValueError(f"the name {name} is that of a registered node")
        if before == NOBODY or mine.is_registered:
            self._owners[name] = mine
            # A key that is registered anew has the lost one's number.
            for client, owner in self._numbers.items():
                if owner == before:
                    self._numbers[client] = mine

    def _take_number(self, node: int, client: int) -> None:
        """Make a node the owner of a client number that has none; evict who has it.

        Raises
        ------
        ValueError
            If the number is another's.
        """
        owner, mine = self._numbers.get(client, NOBODY), self._identity(node)
        self._check_owner(node, owner, f"client {client}", client)
        is_own = self._owns(node, owner)
        for other in self._online:
            if other != node and client in self._hosted[other]:
                if not is_own:
                    self._refuse(node, other, f"client {client}", client)
                super().forget(other)
                self._refused[other] = node, client
                reason = f"client {client} is that of {self.name(node)}, which is back"
                self._leave_out(other, reason)
        if owner == NOBODY or is_own:
            others = {c: o for c, o in self._numbers.items() if o.key != mine.key}
            self._numbers = others | {client: mine}

    def _unite(self, there: dict[int, Description]) -> list[str]:
        """Return all labels; leave out who has the most while they are too many."""
        while True:
            found = self._also.union(*(told.labels for told in there.values()))
            if len(found) <= MOST_LABELS or not there:
                return sorted(found)
            node = max(there, key=lambda n: (len(there[n].labels), n))
            self._leave_out(
                node,
                f"it has {counted(len(there[node].labels), 'label')}, the most of all, "
                f"and the nodes have {len(found)} together; allowed: {MOST_LABELS}",
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
        usable = sum(known.values()) if self._has_classes else described.examples
        told = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "none"
        if usable < self._min_examples:
            raise ValueError(
                f"it has {counted(usable, 'usable example')}, clients.min-examples is "
                f"{self._min_examples}; rows skipped: {told}"
            )
        name, client = described.name, described.client
        self._take_name(node, name)
        if client is None:
            client = self._clients.get(name)
        if client is None:
            client = next(i for i in count() if self._is_free(i))
        self._take_number(node, client)
        self._clients[name] = client
        self._host(node, frozenset({client}), {client: usable})
        log(
            INFO,
            "%s is client %d: %s; rows skipped: %s%s",
            self.name(node),
            client,
            counted(usable, "example"),
            told,
            f"; unknown labels: {printable(', '.join(others))}" if others else "",
        )
        self._tell(
            NodeJoined(
                node=node,
                name=name,
                client=client,
                examples=usable,
                skipped=skipped,
                unknown_labels=shorten(others),
            )
        )

    def _is_free(self, client: int) -> bool:
        return client not in self._clients.values() and client not in self._numbers


def _lasting(owners: Mapping[Any, Owner]) -> list[tuple[Any, dict[str, Any]]]:
    """Return owners with keys: ids of nodes may be others' in the next Flower run."""
    return [
        (what, asdict(owner))
        for what, owner in owners.items()
        if owner.key.startswith(KEY)
    ]
