"""The base of the second phase: sent once, found again, and sent to who lost it."""

import pytest

from slora_flwr.client.process import make_process
from slora_flwr.common.files import run_folder
from slora_flwr.wire.messages import Instruction
from tests.support.grids import RecordingGrid
from tests.support.runs import Config, differ, elsewhere, events, final, ledger, start


class ForgetfulGrid(RecordingGrid):
    """In round 3, the second on the base, a node has lost what `loses` says."""

    loses: tuple[str, ...] = ("process", "disk")

    def before(self, asked: Instruction) -> None:
        if asked.server_round == 3 and asked.base_delta.start is None:
            if "process" in self.loses:
                make_process.cache_clear()
            if "disk" in self.loses:
                (run_folder(self.run.run_id) / f"base-{asked.base}").unlink()


@pytest.mark.parametrize("base", ["residual", "warm-start"])
def test_a_node_that_lost_the_base_is_sent_it_again(
    two_phases: Config, base: str
) -> None:
    two_phases |= {"lora.base": base}
    undisturbed = start(two_phases, RecordingGrid(two_phases))
    config = elsewhere(two_phases)
    grid = ForgetfulGrid(config)
    directory = start(config, grid)
    assert [(i.server_round, i.base_delta.start is not None) for i in grid.asked] == [
        (1, False),
        (2, True),
        (3, False),
        (3, True),
        (4, False),
    ]
    assert events(directory, "failure") == []
    assert not differ(final(directory), final(undisturbed))


def test_a_new_process_finds_the_base_on_disk(two_phases: Config) -> None:
    undisturbed = start(two_phases, RecordingGrid(two_phases))
    config = elsewhere(two_phases)
    grid = ForgetfulGrid(config)
    grid.loses = ("process",)
    directory = start(config, grid)
    sent = [i.server_round for i in grid.asked if i.base_delta.start is not None]
    assert sent == [2]
    assert not differ(final(directory), final(undisturbed))


def test_a_running_process_needs_no_base_on_disk(two_phases: Config) -> None:
    grid = ForgetfulGrid(two_phases)
    grid.loses = ("disk",)
    directory = start(two_phases, grid)
    assert [i.server_round for i in grid.asked] == [1, 2, 3, 4]
    assert events(directory, "failure") == []


def test_base_w0_sends_no_base(two_phases: Config) -> None:
    grid = RecordingGrid(two_phases | {"lora.base": "w0"})
    start(two_phases | {"lora.base": "w0"}, grid)
    assert {i.base for i in grid.asked} == {""}
    assert all(i.base_delta.start is None for i in grid.asked)


def test_a_base_that_is_sent_again_is_in_the_ledger(two_phases: Config) -> None:
    grid = ForgetfulGrid(two_phases)
    directory = start(two_phases, grid)
    for_round = sum(
        size
        for i, size in zip(grid.asked, grid.asked_bytes, strict=True)
        if i.server_round == 3
    )
    down = sum(
        int(row["message_bytes"])
        for row in ledger(directory)
        if (row["round"], row["direction"]) == ("3", "down")
    )
    assert down == pytest.approx(for_round, abs=50)
