"""The nodes of a run, the clients they host, and who trains in which round."""

import time
from collections.abc import Iterable, Mapping
from logging import INFO, WARNING
from typing import cast

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from slora_flwr.adapters.masks import draw_distinct, key
from slora_flwr.server.collect import collect

# How long to wait for the nodes that a simulation says it has.
REGISTRATION_SECONDS = 120.0


class FleetError(RuntimeError):
    """No round can be held with the nodes there are."""


class Fleet:
    """Nodes known by one query each.

    Parameters
    ----------
    expected : Mapping[str, object]
        What a node's description must hold: version, classes, digests of code, backbone
        and partition. A node that differs is named in the log and left out.
    min_nodes : int
        Wait for so many nodes before the first round.
    deadline : float
        Seconds to wait for the answers to a query.
    """

    def __init__(
        self, expected: Mapping[str, object], min_nodes: int, deadline: float
    ) -> None:
        self.sizes: dict[int, int] = {}
        self.left_out: dict[int, str] = {}
        self._expected = expected
        self._min_nodes = min_nodes
        self._deadline = deadline
        self._hosted: dict[int, frozenset[int]] = {}
        self._online: list[int] = []

    @property
    def clients(self) -> list[int]:
        """The client population that nodes online can train, ascending."""
        hosted = frozenset[int]().union(*(self._hosted[n] for n in self._online))
        return sorted(hosted)

    def gather(self, grid: Grid) -> None:
        """Wait for the first nodes and learn what they host.

        Raises
        ------
        FleetError
            If too few nodes are there in time, or none fits.
        """
        until = time.monotonic() + REGISTRATION_SECONDS
        wanted = self._min_nodes
        while len(nodes := list(grid.get_node_ids())) < wanted:
            if time.monotonic() > until:
                raise FleetError(
                    f"{len(nodes)} nodes are online after {REGISTRATION_SECONDS:.0f} "
                    f"seconds; clients.min-nodes is {self._min_nodes}"
                )
            time.sleep(0.1)
        # One node of a simulation knows how many there will be; the server does not.
        wanted = max(wanted, self._query(grid, nodes[:1]))
        while len(list(grid.get_node_ids())) < wanted and time.monotonic() < until:
            time.sleep(0.1)
        online = len(list(grid.get_node_ids()))
        if online < wanted:
            log(WARNING, "only %d of %d nodes are online", online, wanted)
        self.refresh(grid)
        if not self.clients:
            reasons = "; ".join(f"node {n}: {r}" for n, r in self.left_out.items())
            raise FleetError(f"no node can train ({reasons or 'none answered'})")
        log(INFO, "%d nodes host %d clients", len(self._online), len(self.clients))

    def refresh(self, grid: Grid) -> None:
        """Note which nodes are online, and query those not seen before."""
        online = sorted(grid.get_node_ids())
        known = self._hosted.keys() | self.left_out.keys()
        self._query(grid, [node for node in online if node not in known])
        self._online = [node for node in online if node in self._hosted]

    def assign(self, cohort: Iterable[int]) -> dict[int, list[int]]:
        """Deal a cohort to the nodes online that host its clients.

        Clients go in descending order of size, each to the node with the fewest
        examples so far, so that nodes end at about the same time.
        """
        loads = dict.fromkeys(self._online, 0)
        dealt: dict[int, list[int]] = {}
        for client in sorted(cohort, key=lambda c: (-self.sizes[c], c)):
            hosts = [n for n in self._online if client in self._hosted[n]]
            node = min(hosts, key=lambda n: (loads[n], n))
            loads[node] += self.sizes[client]
            dealt.setdefault(node, []).append(client)
        return dealt

    def _query(self, grid: Grid, nodes: list[int]) -> int:
        """Ask nodes to describe themselves; give the number of nodes they tell of."""
        messages = [
            Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY)
            for node in nodes
        ]
        told = 1
        silent = set(nodes)
        for reply in collect(grid, messages, self._deadline):
            node = reply.metadata.src_node_id
            silent.discard(node)
            if reply.has_error():
                self._leave_out(
                    node, f"it cannot describe itself: {reply.error.reason}"
                )
                continue
            try:
                described = reply.content.config_records["config"]
                metrics = reply.content.metric_records["metrics"]
                clients = cast(list[int], metrics["clients"])
                examples = cast(list[int], metrics["examples"])
                sizes = dict(zip(clients, examples, strict=True))
                nodes_told = int(described["nodes"])  # type: ignore[arg-type]
            except (KeyError, TypeError, ValueError) as error:
                self._leave_out(node, f"its description is off: {error!r}")
                continue
            differs = [
                f"{name} is {described.get(name)!r}, the server's is {value!r}"
                for name, value in self._expected.items()
                if described.get(name) != value
            ]
            if differs:
                self._leave_out(node, "; ".join(differs))
                continue
            hosted = frozenset(clients)
            # Nodes of a simulation host the same clients: one set serves them all.
            same = next((h for h in self._hosted.values() if h == hosted), hosted)
            self._hosted[node] = same
            self.sizes |= sizes
            told = max(told, nodes_told)
        for node in silent:
            self._leave_out(node, "it did not describe itself before the deadline")
        return told

    def _leave_out(self, node: int, reason: str) -> None:
        self.left_out[node] = reason
        log(WARNING, "node %d is left out: %s", node, reason)


def sample_cohort(
    clients: list[int], count: int, seed: int, server_round: int
) -> list[int]:
    """Draw a round's cohort without replacement by (seed, round) alone, ascending."""
    if not clients:
        return []
    stream = np.random.Philox(key=key("cohort", seed, server_round))
    drawn = draw_distinct(stream, min(count, len(clients)), len(clients))
    return [clients[i] for i in drawn]
