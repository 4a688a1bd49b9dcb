"""What a hostile node may answer, and that nothing but its own clients is lost."""

import logging
import tracemalloc
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ConfigRecord,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)

from slora_flwr.aggregation.mean import FoldError, Mean
from slora_flwr.runs.events import Event, to_line
from slora_flwr.server import fleet
from slora_flwr.server.fleet import Fleet, FleetError
from slora_flwr.server.own_data_fleet import OwnDataFleet
from slora_flwr.tasks.classification import Classification
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.messages import MessageError, Report, read_evaluation
from slora_flwr.wire.packing import PayloadError, pack
from tests import fuzz
from tests.support.clock import Clock
from tests.support.fleet import EXPECTED, SIZES, FakeGrid, gathered
from tests.support.grids import RecordingGrid, set_to, values
from tests.support.left_out import hold_bad_rounds
from tests.support.own_data import HospitalGrid, hospital
from tests.support.own_data import gathered as gathered_hospitals
from tests.support.runs import Config, differ, elsewhere, events, final, start

MEGABYTE = 2**20


# Replies of a node in a round


def set_config(**entries: Any) -> Callable[[Report], RecordDict]:
    def tamper(report: Report) -> RecordDict:
        content = report.content()
        for name, value in entries.items():
            content.config_records["config"][name.replace("_", "-")] = value
        return content

    return tamper


def other_dtype(report: Report) -> None:
    array = report.update
    report.update = Array("float64", array.shape, array.stype, array.data)


def other_shape(report: Report) -> None:
    array = report.update
    report.update = Array(array.dtype, (-1,), array.stype, array.data)


def oversized(report: Report) -> None:
    report.update.data = bytes(8 * MEGABYTE)


def infinite(report: Report) -> None:
    spoilt = values(report).clone()
    spoilt[3] = -torch.inf
    report.update = pack({"x": spoilt})


def of_all_metrics(value: Any) -> Callable[[Report], RecordDict]:
    def tamper(report: Report) -> RecordDict:
        content = report.content()
        for name in content.metric_records["metrics"]:
            content.metric_records["metrics"][name] = value
        return content

    return tamper


# By a node of one client: what it answers, and what is told.
ALONE: dict[str, tuple[Callable[[Report], RecordDict | None], str]] = {
    "infinite": (infinite, "is not finite or too large"),
    "float64": (other_dtype, "the array is slora.packed of float64"),
    "negative-shape": (other_shape, "with shape (-1,), not "),
    "oversized": (oversized, f"has {8 * MEGABYTE} bytes, not "),
    "enormous-weight": (set_to(examples=[2**63 - 1]), "its weights are [92233720"),
    "infinite-weight": (set_to(examples=[float("inf")]), "its weights are [inf]"),
    "infinite-round": (set_config(server_round=float("inf")), "records are off"),
    "round-of-digits": (set_config(server_round="9" * 10**5), "records are off"),
    "phase-of-bytes": (set_config(phase=b"\xff"), "records are off"),
    "long-fingerprint": (set_config(fingerprint="f" * MEGABYTE), "fingerprint is fff"),
    "escapes": (set_to(fingerprint="\x1b[2J\nnode 1 left"), r"is \x1b[2J\nnode 1 left"),
    "enormous-loss": (set_to(losses=[1.7e308]), "its losses are [1.7e+308]"),
    "negative-loss": (set_to(losses=[-0.5]), "its losses are [-0.5]"),
    "infinite-seconds": (set_to(seconds=[float("inf")]), "its seconds are [inf]"),
    "enormous-payload": (set_to(payloads=[10**15]), "its payloads are [10000000000"),
    "many-figures": (set_to(losses=[0.5] * 10**5), "it has 100000 losses; allowed"),
    "no-lists": (of_all_metrics(1), "records are off"),
    "floats": (of_all_metrics([1.0]), "it answers for [1.0], not client ids"),
    "others-failed": (set_to(failures={99: "x"}), "it says that [99] failed"),
    "many-failed": (
        set_to(failures=dict.fromkeys(range(10**5), "x")),
        "it has 100000 failures; allowed",
    ),
    "bytes-failed": (
        set_config(failed=[b"\x00"], reasons=[b"\xff"]),
        "it says that [b'",
    ),
}


def test_hostile_replies_are_named_and_left_out(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    directory, grid = hold_bad_rounds(config, 6, ALONE)
    failures = events(directory, "failure")
    assert [f["round"] for f in failures] == list(range(2, len(ALONE) + 2))
    for failure, (kind, (_, reason)) in zip(failures, ALONE.items(), strict=True):
        assert reason in failure["reason"], kind
        assert (failure["node"], len(failure["clients"])) == (2, 1)
        assert len(failure["reason"]) < 400
        assert failure["reason"].isprintable()
    assert all(record.getMessage().isprintable() for record in caplog.records)
    for number in range(2, len(ALONE) + 2):
        expected = grid.sent(number) + grid.mean(number)
        torch.testing.assert_close(grid.sent(number + 1), expected, rtol=0, atol=1e-7)


def test_reasons_of_failures_are_lines_of_their_own(config: Config) -> None:
    reason = "\x1b[31m" + "no\n" * MEGABYTE

    def blame(report: Report) -> None:
        for name in ("clients", "examples", "losses", "seconds", "payloads"):
            del getattr(report, name)[0]
        [spared] = report.clients
        report.failures = {spared: reason, (spared + 1) % 6: reason}

    def fail_one(report: Report) -> RecordDict:
        content = report.content()
        other = next(c for c in report.clients)
        content.config_records["config"]["failed"] = [other]
        content.config_records["config"]["reasons"] = [reason]
        return content

    grid = RecordingGrid(config, 3, {2: blame, 3: fail_one})
    failures = events(start(config, grid), "failure")
    # Neither another node's clients nor those that it answers for can have failed.
    assert [(f["round"], f["node"], len(f["clients"])) for f in failures] == [
        (2, 2, 2),
        (3, 2, 2),
    ]
    assert all(f["reason"].startswith("it says that [") for f in failures)


class FailingGrid(RecordingGrid):
    """Node 2 answers with an error whose text is as long as it likes."""

    reason = "\x1b]0;owned\x07<script>" + "x" * MEGABYTE

    def _answer(self, message: Message) -> Message:
        reply = super()._answer(message)
        if (message.metadata.message_type, reply.metadata.src_node_id) == (
            MessageType.TRAIN,
            2,
        ):
            return Message(Error(0, self.reason), reply_to=message)
        return reply


def test_an_error_of_a_megabyte_is_a_line(config: Config) -> None:
    directory = start(config, FailingGrid(config, 3))
    failures = events(directory, "failure")
    assert [f["round"] for f in failures] == [1, 2, 3]
    for failure in failures:
        assert failure["reason"].startswith(r"error 0: \x1b]0;owned\x07<script>xxx")
        assert failure["reason"].endswith(
            f"… ({len(FailingGrid.reason) + 9} characters)"
        )
    assert (directory / "events.jsonl").stat().st_size < 10_000


class ReplayingGrid(RecordingGrid):
    """Node 2 answers with what it, or node 1, answered before."""

    def __init__(self, config: Config, which: tuple[int, int]) -> None:
        super().__init__(config, nodes=3)
        self._which = which
        self._kept: Report | None = None

    def _answer(self, message: Message) -> Message:
        reply = super()._answer(message)
        facts = message.metadata
        if facts.message_type == MessageType.TRAIN:
            if (int(facts.group_id), facts.dst_node_id) == self._which:
                self._kept = Report.read(reply.content)
            elif facts.dst_node_id == 2 and self._kept is not None:
                self.before_replay(self._kept, int(facts.group_id))
                reply.content = self._kept.content()
        return reply

    def before_replay(self, report: Report, server_round: int) -> None:
        """It goes as it is."""


@pytest.mark.parametrize(
    ("which", "told"),
    [
        ((1, 2), ["its round is 1, not 2", "its round is 1, not 3"]),
        ((1, 1), ["it answers for", "its round is 1, not 2", "its round is 1, not 3"]),
    ],
    ids=["old-round", "other-node"],
)
def test_a_replayed_update_is_refused(
    config: Config, which: tuple[int, int], told: list[str]
) -> None:
    directory = start(config, ReplayingGrid(config, which))
    reasons = [f["reason"] for f in events(directory, "failure")]
    assert len(reasons) == len(told)
    assert all(r.startswith(t) for r, t in zip(reasons, told, strict=True))


class PhaseReplayingGrid(ReplayingGrid):
    """It claims the round that it is asked for."""

    def before_replay(self, report: Report, server_round: int) -> None:
        report.server_round = server_round


def test_an_update_of_another_phase_is_refused(config: Config) -> None:
    config |= {"method": "slora"}
    directory = start(config, PhaseReplayingGrid(config, (1, 2)))
    reasons = [f["reason"] for f in events(directory, "failure")]
    assert reasons == ["its phase is 0, not 1"] * 2


class DoublingGrid(RecordingGrid):
    """Every reply comes twice."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [r for r in super().pull_messages(message_ids) for _ in range(2)]


def test_a_reply_that_comes_twice_counts_once(config: Config) -> None:
    once = final(start(config, RecordingGrid(config, 3)))
    config = elsewhere(config)
    twice = start(config, DoublingGrid(config, 3))
    assert not differ(final(twice), once)
    assert not events(twice, "failure")


def test_one_that_fills_the_range_does_not_keep_others_out() -> None:
    """Of 10 examples expected, one has a tenth of what fits."""
    fold = Mean()
    fold.expect(10)
    shapes = {"x": (1,)}
    most = 2**32 / 10
    for sign in (1, -1):
        with pytest.raises(FoldError):
            fold.take(pack({"x": torch.tensor([sign * 1.1 * most])}), shapes, [0], [1])
    fold.take(pack({"x": torch.tensor([0.9 * most])}), shapes, [0], [1])
    for client in range(1, 10):
        fold.take(pack({"x": torch.tensor([0.9 * most])}), shapes, [client], [1])
    torch.testing.assert_close(fold.result()["x"], torch.tensor([0.9 * most]))


# Sizes before memory


@pytest.mark.parametrize("codec", [Codec(), Codec("int8", lossless=True)], ids=str)
def test_an_oversized_payload_takes_no_more_memory(codec: Codec) -> None:
    array = codec.encode({"x": torch.zeros(100)})
    array.data = bytes(64 * MEGABYTE)
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError, match=f"{64 * MEGABYTE} bytes"):
            codec.decode(array, {"x": (100,)})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MEGABYTE / 4


@pytest.mark.parametrize("codec", fuzz.CODECS, ids=str)
def test_an_honest_payload_is_within_the_bound(codec: Codec) -> None:
    count = 363
    state = {"x": torch.randn(count, generator=torch.Generator().manual_seed(1))}
    body, head = codec.parts(count)
    # Far from each other, so that their gaps are wide.
    spread = np.linspace(0, count - 4, body).astype(np.int64)
    chosen = np.concatenate([spread, count - 3 + np.arange(head)])
    array = codec.encode(state, chosen if codec.share else None)
    assert len(array.data) <= codec.most(count)


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_any_input_is_read_or_refused(name: str) -> None:
    assert fuzz.run_target(name, 60, 1) >= 60


# Evaluations


def evaluation(**changes: Any) -> RecordDict:
    figures: dict[str, Any] = {"num-examples": 6, "loss": 0.5, "hits": [1, 1]}
    figures |= {"predictions": [3, 3], "labels": [4, 2]} | changes
    return RecordDict({"metrics": MetricRecord(figures)})


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": float("inf")},
        {"loss": 1.7e308},
        {"loss": -1.0},
        {"hits": [4, 1]},
        {"labels": [4, 3]},
        {"labels": [float("nan"), 2.0]},
        {"labels": [4]},
        {"labels": 6},
        {"predictions": [7, -1]},
        # Sums that wrap around to 6 in 64 bits.
        {
            "labels": [2**63 - 1, 2**63 - 1, 8],
            "predictions": [2**63 - 1, 2**63 - 1, 8],
            "hits": [0, 0, 0],
        },
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_an_evaluation_that_cannot_be_true_is_an_error(changes: dict[str, Any]) -> None:
    classes = max(2, *(len(v) for v in changes.values() if isinstance(v, list)), 2)
    assert read_evaluation(evaluation(), Classification(), 2) is not None
    with pytest.raises(MessageError, match="its figures are off"):
        read_evaluation(evaluation(**changes), Classification(), classes)


# Descriptions


@pytest.mark.parametrize(
    ("clients", "examples"),
    [
        ([0, 1], [30, 10**9]),
        ([0, 1], [30, -1]),
        ([0, 1], [30, 21]),
        ([0, 99], [30, 20]),
        ([0, -1], [30, 20]),
        ([0.0, 1.0], [30, 20]),
        ([0, 1], [30.0, 20.0]),
        ([0], [30, 20]),
        (0, 30),
    ],
    ids=str,
)
def test_a_node_cannot_host_what_there_is_not(
    clock: Clock, clients: Any, examples: Any
) -> None:
    def answer(message: Message) -> Message:
        described = ConfigRecord({**EXPECTED, "nodes": 1})
        told = MetricRecord({"clients": clients, "examples": examples})
        content = RecordDict({"config": described, "metrics": told})
        return Message(content, reply_to=message)

    grid = FakeGrid([1, 2])
    grid.broken[1] = answer
    found = Fleet(EXPECTED, 1, 5.0, SIZES)
    found.gather(grid)
    assert found.left_out.keys() == {1}
    assert found.left_out[1].startswith(("its client ", "its description is off"))
    assert found.sizes == SIZES


@pytest.mark.parametrize("nodes", [float("inf"), float("nan"), b"\xff", "9" * 10**5])
def test_a_description_of_no_numbers_is_left_out(clock: Clock, nodes: Any) -> None:
    grid = FakeGrid([1, 2])
    grid.of_nodes = 1
    honest = grid._answer

    def answer(message: Message) -> Message:
        del grid.broken[1]
        reply = honest(message)
        reply.content.config_records["config"]["nodes"] = nodes
        return reply

    grid.broken[1] = answer
    found = gathered(grid)
    assert found.left_out.keys() == {1}
    assert len(found.left_out[1]) < 400


def test_a_node_that_tells_of_many_nodes_is_not_waited_for_for_ever(
    clock: Clock,
) -> None:
    grid = FakeGrid([1, 2])
    grid.of_nodes = 10**9
    assert gathered(grid).clients == list(SIZES)
    assert clock.now < fleet.REGISTRATION_SECONDS + 10


@pytest.mark.parametrize(
    "described",
    [
        {"labels": {f"label {i}": 1 for i in range(1001)}},
        {"labels": {"x" * 201: 1, "y": 1}},
        {"labels": {"x": 10**18, "y": 1}},
        {"labels": {1: 1, 2: 1}},
        {"labels": {b"x": 1, b"y": 1}},
        {"labels": {}},
    ],
    ids=lambda described: str(described)[:40],
)
def test_labels_that_a_node_would_not_tell_are_left_out(
    clock: Clock, described: dict[str, Any]
) -> None:
    grid = HospitalGrid({7: {"name": "bad"} | described, 8: hospital("b", x=1, y=1)})
    found = gathered_hospitals(grid)
    assert found.left_out[7].startswith("its description is off")
    assert len(found.left_out[7]) < 400
    assert found.classes == ["x", "y"]


def test_names_are_no_more_than_names(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flwr")
    name = "../../etc\x1b[2J\n" + "x" * MEGABYTE
    told: list[Event] = []
    grid = HospitalGrid({7: hospital(name, x=1, y=1)})
    found = OwnDataFleet({"protocol": 7}, 1, 5.0)
    found.gather(grid, told.append)
    assert found.name(7).startswith(r"../../etc\x1b[2J\nxxx")
    assert len(found.name(7)) < 300
    assert all(len(to_line(event)) < 1000 for event in told)
    messages = [record.getMessage() for record in caplog.records]
    assert any("is client 0" in message for message in messages)
    assert all(m.isprintable() and len(m) < 1000 for m in messages)


def test_an_error_of_all_nodes_is_a_short_one(clock: Clock) -> None:
    grid = FakeGrid([1])
    grid.broken[1] = lambda m: Message(Error(0, "x" * MEGABYTE), reply_to=m)
    with pytest.raises(FleetError) as caught:
        gathered(grid)
    assert len(str(caught.value)) < 500
