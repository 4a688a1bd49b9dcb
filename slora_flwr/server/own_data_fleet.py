"""Nodes that train on their own data: one client per node, labels agreed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from logging import INFO, WARNING
from typing import Any

from flwr.common.logger import log

from slora_flwr.common.text import clean_label, lookalikes, printable, shorten
from slora_flwr.data.node_files import LONGEST_LABEL, MOST_LABELS
from slora_flwr.runs.events import NodeJoined
from slora_flwr.server.fleet import MOST_EXAMPLES, Fleet, FleetError

# An honest node has five reasons to skip a row.
MOST_REASONS = 20


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
        self._settled = False

    def agreed(self) -> dict[str, Any]:
        """Return the label names, and the client of each node's name."""
        return {"classes": self.classes, "clients": self._clients}

    def restore(self, agreed: Mapping[str, Any]) -> None:
        """Restore the label names and client numbers."""
        self.classes, self._clients = agreed["classes"], dict(agreed["clients"])

    def name(self, node: int) -> str:
        """Return the name that the node's operator gave it, and its id."""
        found = self._described.get(node)
        return f"{found.name} (node {node})" if found else super().name(node)

    def _admit(
        self, node: int, described: Mapping[str, Any], metrics: Mapping[str, Any]
    ) -> None:
        self._described[node] = Description.read(described, metrics)
        if self._settled:
            self._place(node)

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
        for _, _, node in order:
            try:
                self._place(node)
            except ValueError as error:
                self._leave_out(node, str(error))

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
        client = described.client
        if client is None:
            client = self._clients.get(described.name)
        if client is None:
            client = next(i for i in range(len(self._clients) + 1) if self._is_free(i))
        for other in self._online:
            if other != node and client in self._hosted[other]:
                raise ValueError(f"client {client} is that of {self.name(other)}")
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
