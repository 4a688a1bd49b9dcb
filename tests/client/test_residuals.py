"""Error feedback: what was not sent is kept, and sent later."""

import shutil

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from slora_flwr.client.residuals import Residuals
from slora_flwr.common.files import cache_folder
from slora_flwr.common.tensors import State
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.messages import END, Instruction
from slora_flwr.wire.state_channel import write_update
from tests.support.grids import RUN_IDS, Grid
from tests.support.runs import (
    HEAD_VALUES,
    LORA_VALUES,
    TOP,
    Config,
    differ,
    elsewhere,
    events,
    final,
    start,
)


@settings(max_examples=30)
@given(
    rounds=st.lists(st.integers(0, 2**32), min_size=1, max_size=6),
    dtype=st.sampled_from(["float16", "bfloat16", "int8", "int4"]),
    share=st.sampled_from([0.0, 0.2]),
)
def test_nothing_is_lost_for_good(rounds: list[int], dtype: str, share: float) -> None:
    """All that was read, and what is still owed, is all that was to be sent."""
    codec, residual = Codec(dtype, share), State()
    wanted, read = torch.zeros(150), torch.zeros(150)
    for number, seed in enumerate(rounds):
        update = torch.randn(150, generator=torch.Generator().manual_seed(seed))
        upload = write_update(
            {"x": update},
            codec,
            residual=residual,
            start={},
            importance="magnitude",
            stream=np.random.Philox(key=number),
        )
        residual = upload.residual
        wanted, read = wanted + update, read + upload.update["x"]
        sent = codec.decode(upload.array, {"x": (150,)})
        assert torch.equal(sent["x"], upload.update["x"])
        if share:
            assert int((sent["x"] != 0).sum()) <= 30
    torch.testing.assert_close(read + residual["x"], wanted, rtol=0.0, atol=1e-4)


def context(run_id: int) -> Context:
    return Context(run_id, 5, {}, RecordDict(), {})


@pytest.mark.parametrize("is_only", [True, False])
def test_a_residual_stays_with_its_client_and_phase(is_only: bool) -> None:
    kept = {"x": torch.tensor([1.0, -2.0]), "y": torch.tensor([[0.5]])}
    here, lineage = context(next(RUN_IDS)), next(RUN_IDS)
    store = Residuals(here, lineage, 2, is_only_client=is_only)
    assert store.take(3, "0 f00d ", 0) == {}
    store.keep(3, "0 f00d ", 1, 0, kept)
    again = Residuals(here, lineage, 2, is_only_client=is_only).take(3, "0 f00d ", 1)
    assert not differ(again, kept)
    assert again.keys() == kept.keys()
    assert store.take(3, "1 f00d ", 1) == store.take(3, "0 beef ", 1) == {}
    other = context(next(RUN_IDS)), next(RUN_IDS)
    assert Residuals(*other, 2, is_only_client=is_only).take(3, "", 1) == {}
    if not is_only:
        assert store.take(4, "0 f00d ", 1) == store.take(3, "0 f00d ", 2) == {}
        path = cache_folder() / f"run-{lineage}" / "3" / "1"
        assert path.stat().st_mode & 0o077 == 0


def test_a_damaged_residual_is_as_good_as_lost() -> None:
    here = context(next(RUN_IDS))
    store = Residuals(here, here.run_id, 2, is_only_client=False)
    store.keep(3, "", 1, 0, {"x": torch.ones(2)})
    path = cache_folder() / f"run-{here.run_id}" / "3" / "1"
    path.write_bytes(path.read_bytes()[:-3])
    assert store.take(3, "", 1) == {}


def test_feedback_is_in_the_next_update(config: Config) -> None:
    """Two runs are the same until the residual of round 1 comes with round 2."""
    config |= {"upload.dtype": "int4", "method": "lora"}
    grids = []
    for feedback in (True, False):
        config = elsewhere(config, **{"upload.feedback": feedback})
        grids.append(Grid(config))
        start(config, grids[-1])
    with_, without = grids
    for number, same in ((1, True), (2, True), (3, False)):
        states = [
            next(i.state.data for i in g.asked if i.server_round == number)
            for g in (with_, without)
        ]
        assert (states[0] == states[1]) is same


def test_a_node_of_one_client_keeps_its_residual_in_its_context(
    config: Config,
) -> None:
    class Looking(Grid):
        def _answer(self, message: Message) -> Message:
            if message.metadata.message_type == END:
                kept = self._contexts[message.metadata.dst_node_id].state["residual"]
                assert isinstance(kept, ArrayRecord)
                records.append(dict(kept))
            return super()._answer(message)

    config |= {"clients.count": 0, "upload.dtype": "int8"}
    grid = Looking(config, nodes=3)
    records: list[dict[str, Array]] = []
    start(config | {"clients.per-round": 3}, grid)
    assert len(records) == 3
    for record in records:
        assert list(record) == ["3"]  # of the last round alone
        assert len(record["3"].data) > 4 * (LORA_VALUES + HEAD_VALUES)
    assert not list(cache_folder().glob("run-*/*/3"))
    assert not any("residual" in c.state for c in grid._contexts.values())


def test_a_context_does_not_count_a_round_twice() -> None:
    """A round that is held again starts from what it started from, or from nothing."""
    here, kept = context(next(RUN_IDS)), {"x": torch.ones(2)}
    store = Residuals(here, 0, 2, is_only_client=True)
    store.keep(3, "", 5, 4, kept)
    assert store.take(3, "", 4) == {}
    assert store.take(3, "", 5).keys() == store.take(3, "", 8).keys() == {"x"}


def test_a_residual_that_cannot_be_kept_does_no_harm(config: Config) -> None:
    class Full(Grid):
        def before(self, asked: Instruction) -> None:
            if asked.server_round == 1:  # a file where a folder should be
                folder = cache_folder() / f"run-{asked.lineage}"
                shutil.rmtree(folder, ignore_errors=True)
                folder.write_text("")

    config |= TOP | {"upload.dtype": "int8"}
    grid = Full(config)
    directory = start(config, grid)
    (cache_folder() / f"run-{grid.asked[0].lineage}").unlink()
    assert events(directory, "failure") == []
    config = elsewhere(config, **{"upload.feedback": False})
    assert not differ(final(directory), final(start(config, Grid(config))))


def test_residuals_that_are_lost_do_no_harm(config: Config) -> None:
    class Forgetful(Grid):
        def before(self, asked: Instruction) -> None:
            for path in cache_folder().glob(f"run-{asked.lineage}/*/*"):
                path.unlink()

    config |= TOP | {"upload.dtype": "int8"}
    directory = start(config, Forgetful(config))
    assert events(directory, "failure") == []
    config = elsewhere(config, **{"upload.feedback": False})
    assert not differ(final(directory), final(start(config, Grid(config))))
