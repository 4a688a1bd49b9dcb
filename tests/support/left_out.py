"""Bad replies in a run, and the check that only they are left out."""

from pathlib import Path

import torch

from slora_flwr.wire.messages import Report
from tests.support.grids import RecordingGrid, Tamper, put, values
from tests.support.runs import (
    CLIENTS,
    HEAD_VALUES,
    LORA_VALUES,
    Config,
    events,
    payloads,
    start,
)


def huge(report: Report) -> None:
    spoilt = values(report).clone()
    spoilt[7] = 2**62
    put(report, spoilt)


def check_node_left_out(
    directory: Path, grid: RecordingGrid, reason: str, number: int = 2
) -> None:
    """Check that node 2's fault is recorded and the others' mean is the next state."""
    [failure] = [f for f in events(directory, "failure") if f["round"] == number]
    [missing] = [
        i.clients
        for i, at in zip(grid.asked, grid.asked_nodes, strict=True)
        if (i.server_round, at) == (number, 2)
    ]
    assert failure["node"] == 2
    assert failure["clients"] == missing
    assert reason in failure["reason"]
    told = events(directory, "round")[number - 1]
    assert (told["round"], told["cohort"]) == (number, CLIENTS)
    assert {int(c) for c in told["clients"]} == {*CLIENTS} - {*missing}
    expected = grid.sent(number) + grid.mean(number)
    torch.testing.assert_close(grid.sent(number + 1), expected, rtol=0.0, atol=1e-7)
    good = len(CLIENTS) - len(missing)
    size = good * 4 * (LORA_VALUES + HEAD_VALUES)
    assert payloads(directory)[2 * number - 1] == (number, "lora", "up", good, size)


def hold_bad_rounds(
    config: Config, nodes: int, bad: dict[str, tuple[Tamper, str]]
) -> tuple[Path, RecordingGrid]:
    """Run with one kind of bad reply a round from round 2, and a good last round."""
    tampers = {n: tamper for n, (tamper, _) in enumerate(bad.values(), start=2)}
    config |= {"rounds": len(bad) + 2, "run.eval-every": 0}
    grid = RecordingGrid(config, nodes, tampers)
    return start(config, grid), grid
