"""Bytes that a node's network interface counts."""

import socket

from slora_flwr.wire.messages import Instruction
from tests.support.grids import Grid
from tests.support.runs import Config, events, ledger, start


class CountingGrid(Grid):
    """Nodes of a network interface; what it has counted when each is asked."""

    def __init__(self, config: Config, nodes: int) -> None:
        super().__init__(config, nodes)
        for kept in self._contexts.values():
            kept.node_config["wire-interface"] = "lo"


def test_wire_bytes_are_what_the_interface_counts(config: Config) -> None:
    """Over the real loopback interface, on which nothing else moves so much."""
    datagrams, size = 400, 50_000
    burst = datagrams * size

    class Busy(CountingGrid):
        def before(self, asked: Instruction) -> None:
            if asked.server_round > 1:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                    for _ in range(datagrams):
                        sender.sendto(bytes(size), ("127.0.0.1", 9))

    directory = start(config, Busy(config, nodes=2))
    found = [(r["round"], r["direction"], r["wire_bytes"]) for r in ledger(directory)]
    counted = {(n, way): int(wire) for n, way, wire in found if wire}
    # The first counts have nothing to be compared with. A burst goes before each node
    # trains, and comes back in on this interface.
    assert counted.keys() == {(n, way) for n in "23" for way in ("up", "down")}
    for (number, _), wire in counted.items():
        bursts = 3 if number == "2" else 4
        assert bursts * burst < wire < (bursts + 1) * burst


def test_an_interface_that_is_not_there_is_named(config: Config) -> None:
    grid = CountingGrid(config, 2)
    grid._contexts[2].node_config["wire-interface"] = "../lo"
    directory = start(config, grid)
    reasons = {f["reason"] for f in events(directory, "failure")}
    assert len(reasons) == 1
    assert "wire-interface in the node config is '../lo'; allowed: " in reasons.pop()
