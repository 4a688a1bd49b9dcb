"""The nodes of a run, the clients they host, and who trains in which round."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from heapq import heapreplace
from logging import INFO, WARNING
from typing import Any, cast

from flwr.app import Message, MessageType
from flwr.common.logger import log
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from slora_flwr.common.protocol import installed_version
from slora_flwr.common.text import counted, default_name, printable
from slora_flwr.runs.events import Event, NodeLeftOut, NodePrecision, NodeVersion
from slora_flwr.server.collect import (
    LAST_POLL_SECONDS,
    collect,
    is_gone,
    is_unreadable,
    pull,
    push_some,
)
from slora_flwr.wire.messages import END, write_lineage
from slora_flwr.wire.secure_messages import KEYS

# Seconds to wait for nodes to come online.
REGISTRATION_SECONDS = 120.0
# Limit per client; larger sums would leave no room for others.
MOST_EXAMPLES = 10**7
# A node of which so many replies could not be read is left out for the rest of the run.
MOST_UNREADABLE = 3
LONGEST_VERSION, LONGEST_NAME = 40, 200
# From so many rounds in a row without a reply on, a node rests: for 1 round, then 2, 4…
MOST_SILENT, LONGEST_REST = 2, 32
# Seconds that a run which has ended waits for nodes to remove what they keep.
END_SECONDS = 30.0


class FleetError(RuntimeError):
    """The nodes online cannot train."""


class Fleet:
    """The nodes of a run, each queried when it first comes online or returns.

    Parameters
    ----------
    expected : Mapping[str, object]
        What a node's description must match: protocol, label names, and digests of
        backbone, partition and outside packages. The server logs and excludes any node
        that does not match.
    min_nodes : int
        Number of nodes to wait for before the first round.
    deadline : float
        Seconds to wait for answers to queries.
    sizes : Mapping[int, int] or None
        Each client's number of examples; None if the server does not know it.

    Attributes
    ----------
    precision : str
        The precision in which the server computes, to tell nodes that differ.
    keys : dict[int, bytes]
        With secure aggregation, the public keys that a node told last, by node.
    """

    def __init__(
        self,
        expected: Mapping[str, object],
        min_nodes: int,
        deadline: float,
        sizes: Mapping[int, int] | None = None,
    ) -> None:
        self.precision = "float32"
        self.sizes: dict[int, int] = {}
        self._known = sizes
        self.left_out: dict[int, str] = {}
        self.expected = expected
        self._min_nodes = min_nodes
        self._deadline = deadline
        self._tell: Callable[[Event], None] = lambda event: None
        self._hosted: dict[int, frozenset[int]] = {}
        self._sets: dict[frozenset[int], frozenset[int]] = {}
        self._present: set[int] = set()
        # The name that each node's key is registered under, of nodes that are gone too.
        self._registered: dict[int, str] = {}
        # When each queried node came online, the queries to be sent, and those without
        # an answer yet.
        self._asked: dict[int, str] = {}
        self._waiting = deque[Message]()
        self._pending: dict[str, int] = {}
        self._unreadable = Counter[int]()
        # The version and precision of each node, as told last.
        self._versions: dict[int, str] = {}
        self._precisions: dict[int, str] = {}
        # By node and kind of message, the rounds in a row without a reply; by node, the
        # first round in which it may take part again. Neither outlives the process: a
        # run that is resumed may meet other nodes.
        self._silences = Counter[tuple[int, str]]()
        self._rests: dict[int, int] = {}
        self._round = 0
        self._lineage = 0
        self.keys: dict[int, bytes] = {}
        # Number of nodes in a simulation, once one has reported it; before that 0. All
        # report the same. Elsewhere, where one may be hostile, the smallest counts.
        self._told = 0

    @property
    def clients(self) -> list[int]:
        """The clients that nodes online can train, ascending."""
        # Nodes of a simulation share one set.
        hosted = {id(self._hosted[n]): self._hosted[n] for n in self._awake}
        return sorted(frozenset[int]().union(*hosted.values()))

    @property
    def _online(self) -> list[int]:
        return sorted(self._hosted.keys() & self._present)

    @property
    def _awake(self) -> list[int]:
        """The nodes online that do not rest in this round."""
        return [n for n in self._online if self._rests.get(n, 0) <= self._round]

    def agreed(self) -> dict[str, Any]:
        """Return what the nodes agreed on, for `restore` when a run resumes."""
        return {}

    def restore(self, agreed: Mapping[str, Any]) -> None:
        """Restore what was agreed, before the first query."""

    def name(self, node: int) -> str:
        """Return a node's name for logs, with its id if it is registered under one."""
        registered = self._registered.get(node)
        return f"{registered} (node {node})" if registered else default_name(node)

    def gather(
        self,
        grid: Grid,
        tell: Callable[[Event], None] = lambda event: None,
        lineage: int = 0,
    ) -> None:
        """Wait for the first nodes and query what they host.

        Parameters
        ----------
        grid : Grid
            Flower's grid.
        tell : Callable
            Called with each event, during this call and later.
        lineage : int
            Names the run across interruptions.

        Raises
        ------
        FleetError
            If too few nodes come online in time, or none can train.
        """
        self._tell, self._lineage = tell, lineage
        registered = time.monotonic() + REGISTRATION_SECONDS
        while (online := len(list(grid.get_nodes()))) < self._min_nodes:
            if time.monotonic() > registered:
                raise FleetError(
                    f"{counted(online, 'node is', 'nodes are')} online after "
                    f"{REGISTRATION_SECONDS:.0f} seconds; clients.min-nodes is "
                    f"{self._min_nodes}"
                )
            time.sleep(0.1)
        described = time.monotonic() + self._deadline
        self._refresh(grid)
        # The nodes of a simulation know how many there will be; the server does not.
        self._hear_until(grid, described, lambda: self._told > 0)
        while (online := len(list(grid.get_nodes()))) < self._told:
            if time.monotonic() > registered:
                told = counted(self._told, "node is", "nodes are")
                log(WARNING, "only %d of %s online", online, told)
                break
            time.sleep(0.1)
            self._refresh(grid)
        self._refresh(grid)
        self._hear_until(grid, described)
        unsent = [query.metadata.dst_node_id for query in self._waiting]
        for node in [*self._pending.values(), *unsent]:
            # A later answer still counts.
            self._leave_out(node, "it did not describe itself before the deadline")
        self._settle()
        self._refresh(grid)
        if not self.clients:
            reasons = "; ".join(
                f"{self.name(n)}: {r}" for n, r in sorted(self.left_out.items())
            )
            raise FleetError(f"no node can train ({reasons or 'none answered'})")
        nodes, clients = len(self._online), counted(len(self.clients), "client")
        log(INFO, "%s %s", counted(nodes, "node hosts", "nodes host"), clients)

    def refresh(self, grid: Grid, wanted: int = 0, number: int = 0) -> None:
        """Update the nodes online for a round, and query new or returning ones.

        A node takes part once it has answered. This waits for answers, up to `deadline`
        seconds, only while fewer than `wanted` clients are online. No node rests while
        too few others are online.
        """
        until = time.monotonic() + self._deadline
        self._round = number
        self._refresh(grid)
        if len(self.clients) < wanted:
            self._rests.clear()
        if (online := len(self.clients)) < wanted:
            are = counted(online, "client is", "clients are")
            log(WARNING, "%s online; waiting for %d", are, wanted)
        while len(self.clients) < wanted and time.monotonic() < until:
            time.sleep(LAST_POLL_SECONDS)
            self._refresh(grid)

    def forget(self, node: int) -> None:
        """Exclude a node until it answers another query."""
        self._hosted.pop(node, None)
        self._asked.pop(node, None)

    def note_silence(self, node: int, kind: str) -> None:
        """Exclude a node that did not reply until it answers another query.

        A node that is silent again and again makes each round last until its deadline,
        so it rests for more and more rounds.

        Parameters
        ----------
        node : int
            The node's id.
        kind : str
            The message's type. Each is counted apart: a node that trains and never
            evaluates holds up rounds too.
        """
        self.forget(node)
        self._silences[node, kind] += 1
        silent = self._silences[node, kind]
        if silent >= MOST_SILENT:
            rest = min(2 ** (silent - MOST_SILENT), LONGEST_REST)
            self._rests[node] = self._round + rest + 1
            self._leave_out(
                node,
                f"it did not reply to {kind} messages of {silent} rounds in a row, and "
                f"rests for {counted(rest, 'round')}",
            )

    def note_reply(self, node: int, kind: str) -> None:
        """Begin anew to count a node's silent rounds."""
        del self._silences[node, kind]

    def dismiss(self, grid: Grid) -> None:
        """Have the nodes online remove what they keep for the run, which has ended.

        The run waits a little, since a SuperLink passes on no messages of a run that is
        over. Whatever goes wrong is no failure of the run: nodes bound what they keep.
        """
        try:
            messages = [
                Message(
                    write_lineage(self._lineage),
                    dst_node_id=node.node_id,
                    message_type=END,
                    ttl=END_SECONDS,
                )
                for node in grid.get_nodes()
            ]
            if messages:
                for _ in collect(grid, messages, END_SECONDS):
                    pass
        except Exception as error:
            log(WARNING, "nodes may keep files of this run: %s", printable(error))

    def count_unreadable(self, reply: Message) -> None:
        """Count a reply that cannot be read; leave its node out if it is one too many.

        An accident in the network does not make a reply unreadable, so a node that
        sends several is broken or hostile.
        """
        node = reply.metadata.src_node_id
        if is_unreadable(reply):
            self._unreadable[node] += 1
        if self._unreadable[node] == MOST_UNREADABLE:
            self.forget(node)
            reason = f"{MOST_UNREADABLE} of its replies could not be read"
            self._leave_out(node, f"{reason}; it is not asked again in this run")

    def assign(self, cohort: Iterable[int]) -> dict[int, list[int]]:
        """Return the clients of a cohort that each node online trains.

        Clients are assigned in descending order of size, each to the node with the
        fewest examples so far, so that nodes finish at about the same time.
        """
        cohort = set(cohort)
        # Nodes that host the same clients differ only in their loads: one queue each.
        queues: dict[int, list[tuple[int, int]]] = {}
        for node in self._awake:
            queues.setdefault(id(self._hosted[node]), []).append((0, node))
        hosts: dict[int, list[list[tuple[int, int]]]] = {c: [] for c in cohort}
        for queue in queues.values():  # sorted by node, and so a heap
            for client in self._hosted[queue[0][1]] & cohort:
                hosts[client].append(queue)
        dealt: dict[int, list[int]] = {}
        for client in sorted(cohort, key=lambda c: (-self.sizes[c], c)):
            queue = min(hosts[client], key=lambda queue: queue[0])
            load, node = queue[0]
            heapreplace(queue, (load + self.sizes[client], node))
            dealt.setdefault(node, []).append(client)
        return dealt

    def _refresh(self, grid: Grid) -> None:
        infos = [
            info
            for info in grid.get_nodes()
            if self._unreadable[info.node_id] < MOST_UNREADABLE
        ]
        since = {info.node_id: info.last_activated_at for info in infos}
        self._present = set(since)
        self._identify(infos)
        new = {n: at for n, at in since.items() if self._asked.get(n) != at}
        for node in new:
            self.forget(node)
        if new:
            self._ask(grid, new)
        self._hear(grid)

    def _identify(self, infos: list[NodeInfo]) -> None:
        """Note what Flower says of the nodes online."""
        for info in infos:
            self._registered[info.node_id] = printable(info.name, LONGEST_NAME)

    def _ask(self, grid: Grid, since: Mapping[int, str]) -> None:
        """Ask nodes to describe themselves."""
        self._asked |= since
        for node in since:
            self.left_out.pop(node, None)
        self._waiting.extend(
            Message(
                write_lineage(self._lineage),
                dst_node_id=node,
                message_type=MessageType.QUERY,
                ttl=self._deadline,
            )
            for node in since
        )
        push_some(grid, self._waiting, self._pending)

    def _hear_until(
        self, grid: Grid, until: float, enough: Callable[[], bool] = lambda: False
    ) -> None:
        """Wait for all answers, until `enough` is true or the time `until` has come."""
        while self._pending and not enough() and time.monotonic() < until:
            time.sleep(LAST_POLL_SECONDS)
            self._hear(grid)

    def _hear(self, grid: Grid) -> None:
        for reply, _ in pull(grid, self._pending):
            node = reply.metadata.src_node_id
            self.left_out.pop(node, None)
            if is_gone(reply):
                self.forget(node)
                continue
            try:
                described, metrics = self._read(reply)
                self._admit(node, described, metrics)
                self.keys[node] = described.get(KEYS, b"")
                self._tell_version(node, described)
                self._tell_precision(node, described)
            except ValueError as error:
                self._leave_out(node, str(error))
                self.count_unreadable(reply)
        push_some(grid, self._waiting, self._pending)

    def _read(self, reply: Message) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Return the records of a description that matches this run.

        Raises
        ------
        ValueError
            With the reason why the node cannot take part.
        """
        if reply.has_error():
            raise ValueError(f"it cannot describe itself: {reply.error.reason}")
        try:
            described = reply.content.config_records["config"]
            metrics = reply.content.metric_records["metrics"]
        except KeyError as error:
            raise ValueError(f"its description is off: {error!r}") from error
        differs = [
            f"{name} is {described.get(name)!r}, the server's is {value!r}"
            for name, value in self.expected.items()
            if described.get(name) != value
        ]
        if differs:
            differs += self._find_cause(described)
            raise ValueError("; ".join(differs))
        try:
            told = int(described["nodes"])  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"its description is off: {error!r}") from error
        if told < 1:
            raise ValueError(f"it is of {counted(told, 'node')}; allowed: 1 or more")
        self._told = min(self._told or told, told)
        return described, metrics

    def _find_cause(self, described: Mapping[str, Any]) -> Iterator[str]:
        """Yield what may be why a description does not match, and what to do."""
        own = installed_version()
        given = printable(described.get("version", own), LONGEST_VERSION)
        if given != own:
            yield f"version is {given!r}, the server's is {own!r}"
        protocol, right = described.get("protocol"), self.expected.get("protocol")
        if protocol != right:
            newer = isinstance(protocol, int) and protocol > cast(int, right)
            yield f"upgrade {'the server' if newer else 'the node'}"

    def _tell_version(self, node: int, described: Mapping[str, Any]) -> None:
        """Tell once that a node has another version than the server."""
        own, name = installed_version(), self.name(node)
        given = printable(described.get("version", own), LONGEST_VERSION)
        if given != self._versions.get(node, own):
            log(INFO, "%s has slora-flwr %s, the server %s", name, given, own)
            self._tell(NodeVersion(node=node, name=name, version=given, server=own))
        self._versions[node] = given

    def _tell_precision(self, node: int, described: Mapping[str, Any]) -> None:
        """Tell once that a node computes in another precision than the server."""
        own, name = self.precision, self.name(node)
        given = printable(described.get("precision", own), LONGEST_VERSION)
        if given not in (own, self._precisions.get(node)):
            log(INFO, "%s computes in %s, the server in %s", name, given, own)
            self._tell(NodePrecision(node=node, name=name, precision=given, server=own))
        self._precisions[node] = given

    def _admit(
        self, node: int, described: Mapping[str, Any], metrics: Mapping[str, Any]
    ) -> None:
        """Admit a node.

        Raises
        ------
        ValueError
            With the reason why the node cannot take part.
        """
        try:
            clients = cast(list[int], metrics["clients"])
            sizes = dict(zip(clients, metrics["examples"], strict=True))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"its description is off: {error!r}") from error
        for client, size in sizes.items():
            told = self.sizes.get(client, size)
            right = told if self._known is None else self._known.get(client)
            is_count = type(size) is int and 0 <= size <= MOST_EXAMPLES
            if type(client) is not int or not is_count or size != right:
                raise ValueError(
                    f"its client {client} has {size} examples; allowed: "
                    + (f"up to {MOST_EXAMPLES}" if right == size else f"{right}")
                )
        # Nodes of a simulation host the same clients: one set serves them all.
        hosted = frozenset(clients)
        self._host(node, self._sets.setdefault(hosted, hosted), sizes)

    def _host(self, node: int, clients: frozenset[int], sizes: dict[int, int]) -> None:
        self._hosted[node] = clients
        self.sizes |= sizes

    def _settle(self) -> None:
        """Decide what depends on the answers of all nodes."""

    def _leave_out(self, node: int, reason: str) -> None:
        self.left_out[node] = reason = printable(reason)
        log(WARNING, "%s is left out: %s", self.name(node), reason)
        self._tell(NodeLeftOut(node=node, name=self.name(node), reason=reason))
