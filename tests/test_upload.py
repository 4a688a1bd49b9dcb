"""Updates on their way up, and states on their way down: whole runs, coded."""

import itertools
import math
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rounds import (
    HEAD_VALUES,
    LORA_VALUES,
    SPARSE_VALUES,
    Config,
    RecordingGrid,
    differ,
    elsewhere,
    events,
    final,
    ledger,
    make_config,
    payloads,
    start,
    summary,
)

from slora_flwr.client import handlers as node
from slora_flwr.client.residuals import Residuals
from slora_flwr.common.files import cache_folder
from slora_flwr.common.tensors import State
from slora_flwr.engines.inline import InlineGrid
from slora_flwr.server.state_versions import Broadcast
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.messages import Instruction
from slora_flwr.wire.selection import choose, weigh_by_product
from slora_flwr.wire.upload import code_update

RUN_IDS = itertools.count(1000)
INT8: Config = {"upload.dtype": "int8", "download.dtype": "int8"}
TOP: Config = {"upload.top-k": 0.1, "upload.importance": "product"}
LOSSLESS: Config = {"upload.lossless": True, "download.lossless": True}


@pytest.fixture
def config(corpus: Path, tiny_models: dict[str, Path], tmp_path: Path) -> Config:
    return make_config(corpus, tiny_models["bert"], tmp_path / "run")


class Grid(RecordingGrid):
    """A recording grid whose runs have ids of their own."""

    def __init__(self, config: Config, nodes: int = 1) -> None:
        super().__init__(config, nodes)
        InlineGrid.__init__(self, config, nodes, next(RUN_IDS))


# Which values travel


def test_the_product_rule_by_hand() -> None:
    """|dB_ij| times the norm of A's row j; |dA_jk| times that of B's column j."""
    changes = {
        "m.lora_A": torch.tensor([[0.0, 4.0, -3.0], [0.0, 0.0, 0.5]]),
        "m.lora_B": torch.tensor([[0.0, -1.0], [1.0, 0.0]]),
        "head": torch.tensor([-0.25, 0.5]),
    }
    factors = {
        "m.lora_A": torch.tensor([[3.0, 4.0, 0.0], [0.0, 1.0, 0.5]]),
        "m.lora_B": torch.tensor([[5.0, -1.0], [12.0, 2.0]]),
    }
    # A's rows have norms 5 and root 1.25, B's columns 13 and root 5.
    weights = weigh_by_product(changes, factors)
    a = torch.tensor([[0.0, 52.0, 39.0], [0.0, 0.0, 0.5 * math.sqrt(5)]])
    b = torch.tensor([[0.0, math.sqrt(1.25)], [5.0, 0.0]])
    torch.testing.assert_close(weights["m.lora_A"], a)
    torch.testing.assert_close(weights["m.lora_B"], b)
    assert weights["head"].tolist() == [0.25, 0.5]


def test_the_product_rule_with_a_factor_that_rests() -> None:
    factors = {"m.lora_A": torch.tensor([[3.0, 4.0]]), "m.lora_B": torch.zeros(2, 1)}
    weights = weigh_by_product({"m.lora_B": torch.tensor([[1.0], [-2.0]])}, factors)
    assert weights["m.lora_B"].tolist() == [[5.0], [10.0]]


def test_the_largest_are_chosen_of_adapter_and_head() -> None:
    weights = {
        "a": torch.tensor([[1.0, 9.0], [3.0, 2.0]]),
        "b": torch.tensor([7.0, 0.0]),
        "head": torch.tensor([100.0, 200.0, 50.0]),
    }
    # A third of six is 2: the 9 and the 7; of the head's three, 1.
    assert Codec(share=1 / 3, head=3).parts(9) == [2, 1]
    assert choose(weights, [2, 1], head=3).tolist() == [1, 4, 7]
    assert choose(weights, [1, 0], head=3).tolist() == [1]
    assert choose({"b": weights["b"]}, [1, 0], head=0).tolist() == [0]


# Error feedback


@settings(max_examples=30, deadline=None)
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
        upload = code_update(
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
        path = cache_folder() / f"residuals-{lineage}" / "3" / "1"
        assert path.stat().st_mode & 0o077 == 0


def test_a_damaged_residual_is_as_good_as_lost() -> None:
    here = context(next(RUN_IDS))
    store = Residuals(here, here.run_id, 2, is_only_client=False)
    store.keep(3, "", 1, 0, {"x": torch.ones(2)})
    path = cache_folder() / f"residuals-{here.run_id}" / "3" / "1"
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
    config |= {"clients.count": 0, "upload.dtype": "int8"}
    grid = Grid(config, nodes=3)
    start(config | {"clients.per-round": 3}, grid)
    for kept in grid._contexts.values():
        record = kept.state["residual"]
        assert isinstance(record, ArrayRecord)
        assert list(record) == ["3"]  # of the last round alone
        assert len(record["3"].data) > 4 * (LORA_VALUES + HEAD_VALUES)
    assert not list(cache_folder().glob("residuals-*/*/3"))


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
                folder = cache_folder() / f"residuals-{asked.lineage}"
                shutil.rmtree(folder, ignore_errors=True)
                folder.write_text("")

    config |= TOP | {"upload.dtype": "int8"}
    grid = Full(config)
    directory = start(config, grid)
    (cache_folder() / f"residuals-{grid.asked[0].lineage}").unlink()
    assert events(directory, "failure") == []
    config = elsewhere(config, **{"upload.feedback": False})
    assert not differ(final(directory), final(start(config, Grid(config))))


def test_residuals_that_are_lost_do_no_harm(config: Config) -> None:
    class Forgetful(Grid):
        def before(self, asked: Instruction) -> None:
            for path in cache_folder().glob(f"residuals-{asked.lineage}/*/*"):
                path.unlink()

    config |= TOP | {"upload.dtype": "int8"}
    directory = start(config, Forgetful(config))
    assert events(directory, "failure") == []
    config = elsewhere(config, **{"upload.feedback": False})
    assert not differ(final(directory), final(start(config, Grid(config))))


# Whole runs

CODED: dict[str, Config] = {
    "int8": INT8,
    "int4": {"upload.dtype": "int4"},
    "half": {"upload.dtype": "float16", "download.dtype": "bfloat16"},
    "top-k": TOP,
    "all": INT8 | TOP | LOSSLESS,
    "sparse": INT8 | LOSSLESS | {"method": "sft"},
    "fft": INT8 | TOP | LOSSLESS | {"method": "fft"},
    "lossless": LOSSLESS,
    "exact": INT8 | {"method": "slora", "lora.aggregator": "exact"},
    "flexlora": INT8 | LOSSLESS | {"method": "flexlora"},
    "alternate": INT8 | TOP | {"method": "alternate-lora"},
    "ffa": INT8 | {"method": "slora", "lora.aggregator": "ffa"},
    "ffa-lora": TOP | {"method": "ffa-lora"},
    "redrawn": INT8 | LOSSLESS | {"method": "slora", "sparse.schedule": "per-round"},
    "federa": INT8 | {"lora.start": "federa"},
    "ranks": TOP | {"lora.ranks": "4, 2", "upload.dtype": "int8"},
    "houlsby": INT8 | LOSSLESS | {"method": "houlsby"},
    "holdout": INT8 | LOSSLESS | {"method": "slora", "clients.holdout": 0.3},
}


@pytest.mark.parametrize("name", CODED)
def test_one_node_is_many_nodes(config: Config, name: str) -> None:
    """Bit for bit, and byte for byte of each client's payload."""
    config |= CODED[name] | {"rounds": 4, "sparse.rounds": 2, "clients.per-round": 4}
    found = []
    for nodes in (1, 3, 6):
        config = elsewhere(config)
        directory = start(config, Grid(config, nodes))
        assert events(directory, "failure") == []
        found.append((final(directory), payloads(directory)))
    for state, bytes_ in found[1:]:
        assert not differ(state, found[0][0])
        assert bytes_ == found[0][1]


@pytest.mark.parametrize("name", [n for n, c in CODED.items() if "lossless" not in n])
def test_coded_runs_learn_as_plain_ones_do(config: Config, name: str) -> None:
    """They end near the plain run: in loss, and in state nearer than that one moved."""
    coded = config | CODED[name]
    plain = {k: v for k, v in coded.items() if not k.startswith(("upload", "download"))}
    plain = elsewhere(plain)
    directory = start(coded, Grid(coded))
    grid = Grid(plain)
    reference = start(plain, grid)
    has_top_k = "upload.top-k" in coded
    away = abs(summary(directory)["loss"] - summary(reference)["loss"])
    # A base or a state that is read wrongly is off by tenths. What is not sent yet is
    # not learned yet.
    assert 0 < away < (math.inf if has_top_k else 0.01)
    if coded["method"] == "slora" or "lora.start" in coded:
        return  # their start is coded too, and the base has what it is off
    after, expected = final(directory), final(reference)
    moved = torch.cat([t.reshape(-1) for t in expected.values()]) - grid.sent(1)
    error = torch.cat([(after[n] - t).reshape(-1) for n, t in expected.items()])
    assert error.norm() < (0.9 if has_top_k else 0.4) * moved.norm()


def test_lossless_changes_nothing_but_bytes(config: Config) -> None:
    config |= {"method": "slora", "rounds": 4, "sparse.rounds": 2}
    plain = start(config, Grid(config))
    config = elsewhere(config, **LOSSLESS)
    coded = start(config, Grid(config))
    assert not differ(final(coded), final(plain))
    for there, here in zip(payloads(plain), payloads(coded), strict=True):
        assert there[:4] == here[:4]
        assert here[4] < there[4]


@pytest.mark.parametrize(
    ("dtype", "bits", "block"), [("int8", 8, 4), ("int4", 4, 4), ("bfloat16", 16, 0)]
)
def test_bytes_of_coded_updates(
    config: Config, dtype: str, bits: int, block: int
) -> None:
    """A frame's header, codes, a scale for each 128; planned and counted alike."""
    config |= {"method": "slora", "rounds": 2, "clients.per-round": 4}
    config |= {"upload.dtype": dtype, "download.dtype": "int8"}
    directory = start(config, Grid(config, nodes=3))

    def size(*parts: int, bits: int = 8, block: int = 4) -> int:
        codes = sum(math.ceil(n * bits / 8) for n in parts)
        return 13 + codes + sum(block * math.ceil(n / 128) for n in parts)

    up = {"bits": bits, "block": block}
    base = size(SPARSE_VALUES + LORA_VALUES)
    assert payloads(directory) == [
        (1, "sparse", "down", 4, 4 * size(SPARSE_VALUES, HEAD_VALUES)),
        (1, "sparse", "up", 4, 4 * size(SPARSE_VALUES, HEAD_VALUES, **up)),
        (2, "lora", "down", 4, 4 * (size(LORA_VALUES, HEAD_VALUES) + base)),
        (2, "lora", "up", 4, 4 * size(LORA_VALUES, HEAD_VALUES, **up)),
    ]
    for row in ledger(directory):
        assert row["planned_payload_bytes"] == row["payload_bytes"]


def test_top_k_spares_the_sparse_phase(config: Config) -> None:
    config |= TOP | {"method": "slora", "rounds": 2}
    directory = start(config, Grid(config))
    up = {phase: size for _, phase, way, _, size in payloads(directory) if way == "up"}
    assert up["sparse"] == 6 * 4 * (SPARSE_VALUES + HEAD_VALUES)
    # A tenth of each in float32, and at most 4.7 bits for a position, and a table.
    count = math.ceil(LORA_VALUES / 10) + math.ceil(HEAD_VALUES / 10)
    assert 6 * 4 * count < up["lora"] < 6 * ((4 + 4.7 / 8) * count + 100)


def test_message_bytes_are_few_where_each_node_has_one_client(config: Config) -> None:
    """What the ledger counts as payload is what messages carry, and little more."""
    config |= INT8 | TOP | LOSSLESS | {"method": "lora"}
    directory = start(config, Grid(config, nodes=6))
    for row in ledger(directory):
        payload, message = int(row["payload_bytes"]), int(row["message_bytes"])
        assert payload < message < payload + 6 * 600


# Differences


class Forgetful(Grid):
    """In round 3 the nodes' process is a new one, without the state of round 2."""

    def before(self, asked: Instruction) -> None:
        if asked.server_round == 3 and asked.since:
            node._worker.cache_clear()


def test_a_client_with_the_last_state_gets_the_difference(config: Config) -> None:
    config |= LOSSLESS | {"method": "lora", "rounds": 4, "run.eval-every": 0}
    grid = Grid(config, nodes=2)
    start(config, grid)
    assert [bool(asked.since) for asked in grid.asked] == [False] * 2 + [True] * 6


def test_who_missed_a_round_gets_all(config: Config) -> None:
    config |= LOSSLESS | {"rounds": 6, "clients.per-round": 3, "run.eval-every": 0}
    grid = Grid(config, nodes=6)
    directory = start(config, grid)
    assert events(directory, "failure") == []
    # Three nodes train three clients each round: they get differences from round 2 on.
    changes = {i.server_round: len(i.state.data) for i in grid.asked if i.since}
    assert changes.keys() == {2, 3, 4, 5, 6}
    # The ledger counts clients, of whom few were in the cohort before.
    down = {n: size for n, _, way, _, size in payloads(directory) if way == "down"}
    cohorts = {e["round"]: set(e["cohort"]) for e in events(directory, "round")}
    had = {n: len(cohorts[n] & cohorts[n - 1]) for n in changes}
    assert {*had.values()} >= {1, 2}
    for number in [n for n in changes if had[n] < 3]:
        change = changes[number]
        whole, rest = divmod(down[number] - had[number] * change, 3 - had[number])
        assert (rest, whole > 1.01 * change) == (0, True)
        assert whole <= 4 * (LORA_VALUES + HEAD_VALUES)


def test_a_node_that_lost_the_state_is_sent_it_whole(config: Config) -> None:
    config |= LOSSLESS | {"rounds": 4, "run.eval-every": 0}
    undisturbed = start(config, Grid(config))
    config = elsewhere(config)
    grid = Forgetful(config)
    directory = start(config, grid)
    assert [(i.server_round, bool(i.since)) for i in grid.asked] == [
        (1, False),
        (2, True),
        (3, True),
        (3, False),
        (4, False),  # it may keep nothing
    ]
    assert events(directory, "failure") == []
    assert not differ(final(directory), final(undisturbed))


def test_a_broadcast_by_hand() -> None:
    """Versions of three states; who has the last, the one before, or none."""
    codec = Codec("int8", lossless=True, head=2)
    known = {"x": torch.linspace(0.0, 1.0, 1000)}
    cast = Broadcast(codec, known)
    states: list[State] = []
    for step in (0.0, 1e-3, 2e-3):
        sent = {"x": known["x"] + step * torch.arange(1000) / 1000, "y": torch.ones(2)}
        read = cast.publish(sent)
        # int8 of the difference to what is known, not of the values themselves.
        assert (read["x"] - sent["x"]).abs().max() <= step / 254 + 1e-7
        states.append(read)
        if step == 0.0:
            cast.received(1, [10])
        if step == 1e-3:
            cast.received(2, [20])
    whole, since = cast.letter(3)
    assert since == ""
    assert cast.letter(1) == (whole, "")  # it missed one
    change, since = cast.letter(2)
    assert since != ""
    assert len(change.data) < len(whole.data)
    assert cast.letter(2, anew=True) == (whole, "")
    assert cast.owed([10, 20, 30]) == 2 * len(whole.data) + len(change.data)


def test_the_same_state_twice_is_no_new_version() -> None:
    """After an evaluation the next round's clients have their state already."""
    cast = Broadcast(Codec(lossless=True), {})
    state: dict[str, Any] = {"x": torch.randn(1000)}
    cast.publish(state)
    cast.received(1, [1])
    cast.publish({"x": state["x"].clone()})
    change, since = cast.letter(1)
    assert since != ""
    assert len(change.data) < 100


# Bytes on the wire


class CountingGrid(Grid):
    """Nodes of a network interface; what it has counted when each is asked."""

    def __init__(self, config: Config, nodes: int) -> None:
        super().__init__(config, nodes)
        for kept in self._contexts.values():
            kept.node_config["wire-interface"] = "lo"


def test_wire_bytes_are_what_the_interface_counts(config: Config) -> None:
    """Over the real loopback interface, on which nothing else moves so much."""
    size = 50_000

    class Busy(CountingGrid):
        def before(self, asked: Instruction) -> None:
            if asked.server_round > 1:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                    sender.sendto(bytes(size), ("127.0.0.1", 9))

    directory = start(config, Busy(config, nodes=2))
    found = [(r["round"], r["direction"], r["wire_bytes"]) for r in ledger(directory)]
    counted = {(n, way): int(wire) for n, way, wire in found if wire}
    # The first counts have nothing to be compared with. A packet goes before each node
    # trains, and comes back in on this interface.
    assert counted.keys() == {(n, way) for n in "23" for way in ("up", "down")}
    for (number, _), wire in counted.items():
        packets = 3 if number == "2" else 4
        assert packets * size < wire < (packets + 1) * size


def test_an_interface_that_is_not_there_is_named(config: Config) -> None:
    grid = CountingGrid(config, 2)
    grid._contexts[2].node_config["wire-interface"] = "../lo"
    directory = start(config, grid)
    reasons = {f["reason"] for f in events(directory, "failure")}
    assert len(reasons) == 1
    assert "wire-interface in the node config is '../lo'; allowed: " in reasons.pop()
