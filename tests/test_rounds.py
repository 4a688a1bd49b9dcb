"""Whole runs over in-process nodes: rounds, bad replies, bytes, the run directory."""

import csv
import gc
import json
import random
import tomllib
import weakref
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASSES, Clock
from flwr.app import Array, ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.common.serde import message_to_proto
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from slora_flwr.client import handlers as node
from slora_flwr.common.files import cache_folder
from slora_flwr.config import ConfigError, Value, flatten, parse
from slora_flwr.engines.inline import InlineGrid
from slora_flwr.server import collect
from slora_flwr.server.run import run
from slora_flwr.server.strategy import TooFewRepliesError
from slora_flwr.training.loop import Evaluation
from slora_flwr.training.worker import ClientError, Trained, Worker
from slora_flwr.wire.messages import Instruction, Report
from slora_flwr.wire.packing import pack, unpack

State = dict[str, Tensor]
Config = dict[str, Value]
# Changes a report in place, or gives the content to answer with in its stead.
Tamper = Callable[[Report], RecordDict | None]

CLIENTS = list(range(6))
HIDDEN, INNER, LAYERS, RANK = 32, 48, 2, 4  # of conftest's BERT
# By hand: each layer has four matrices of 32 x 32 and two of 32 x 48, of which a mask
# of density 0.05 takes round(51.2) and round(76.8) entries.
SPARSE_VALUES = LAYERS * (4 * 51 + 2 * 77)
LORA_VALUES = LAYERS * RANK * (4 * (HIDDEN + HIDDEN) + 2 * (HIDDEN + INNER))
HEAD_VALUES = len(CLASSES) * HIDDEN + len(CLASSES)


def make_config(corpus: Path, model: Path, directory: Path) -> Config:
    return {
        "method": "lora",
        "rounds": 3,
        "model.name": str(model),
        "data.name": str(corpus),
        "data.max-length": 12,
        "clients.count": 6,
        "clients.per-round": 6,
        "clients.partitioner": "iid",
        "train.batch-size": 32,
        "sparse.rounds": 1,
        "sparse.density": 0.05,
        "lora.rank": RANK,
        "run.dir": str(directory),
    }


@pytest.fixture
def config(corpus: Path, tiny_models: dict[str, Path], tmp_path: Path) -> Config:
    return make_config(corpus, tiny_models["bert"], tmp_path / "run")


class RecordingGrid(InlineGrid):
    """Keeps what was asked and answered; `tampers` are for reports of some rounds."""

    def __init__(
        self,
        config: Config,
        nodes: int = 1,
        tampers: Mapping[int, Tamper] | None = None,
        bad: Iterable[int] = (2,),
    ) -> None:
        super().__init__(config, nodes)
        self.asked: list[Instruction] = []
        self.asked_nodes: list[int] = []
        self.queried: list[int] = []
        self.asked_bytes: list[int] = []
        self.reports: list[Report] = []
        self.evaluations: list[dict[str, Any]] = []
        self._tampers, self._bad = tampers or {}, set(bad)

    def _answer(self, message: Message) -> Message:
        kind, at = message.metadata.message_type, message.metadata.dst_node_id
        if kind == MessageType.QUERY:
            self.queried.append(at)
        if kind == MessageType.TRAIN:
            self.asked.append(Instruction.read(message.content))
            self.asked_nodes.append(at)
            self.asked_bytes.append(len(message_to_proto(message).SerializeToString()))
            self.before(self.asked[-1])
        reply = super()._answer(message)
        if kind == MessageType.EVALUATE:
            self.evaluations.append(dict(reply.content.metric_records["metrics"]))
        if kind != MessageType.TRAIN or reply.has_error():
            return reply
        report = Report.read(reply.content)
        number = self.asked[-1].server_round
        if at in self._bad and number in self._tampers:
            reply.content = self._tampers[number](report) or report.content()
        else:
            self.reports.append(report)
        return reply

    def before(self, asked: Instruction) -> None:
        """Something happens before a node reads an instruction."""

    def sent(self, server_round: int) -> Tensor:
        """What state the round started from."""
        return values(next(i for i in self.asked if i.server_round == server_round))

    def mean(self, server_round: int) -> Tensor:
        """The mean of the round's good updates, by hand."""
        good = [r for r in self.reports if r.server_round == server_round]
        total = torch.stack([weighted(report) for report in good]).sum(dim=0)
        return (total / sum(sum(report.examples) for report in good)).float()


def values(of: Instruction | Report) -> Tensor:
    array = of.state if isinstance(of, Instruction) else of.update
    dtype = {"float32": torch.float32, "int64": torch.int64}[array.dtype]
    return torch.frombuffer(bytearray(array.data), dtype=dtype)


def weighted(report: Report) -> Tensor:
    """The sum of a node's updates, each times its examples."""
    if len(report.clients) == 1:
        return values(report).double() * report.examples[0]
    return values(report).double() / 2**30


def start(config: Config, grid: InlineGrid) -> Path:
    run(grid, config, grid.run.run_id)
    return Path(str(config["run.dir"]))


def final(directory: Path, name: str = "last") -> State:
    return load_file(directory / "checkpoints" / f"{name}.safetensors")


def facts(directory: Path, name: str) -> dict[str, str]:
    path = directory / "checkpoints" / f"{name}.safetensors"
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    lines = (directory / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def summary(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "summary.json").read_text()))


def ledger(directory: Path) -> list[dict[str, str]]:
    with (directory / "ledger.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def payloads(directory: Path) -> list[tuple[int, str, str, int, int]]:
    return [
        (
            int(row["round"]),
            row["phase"],
            row["direction"],
            int(row["clients"]),
            int(row["payload_bytes"]),
        )
        for row in ledger(directory)
    ]


def elsewhere(config: Config, **changes: Value) -> Config:
    """The same run in another directory."""
    return config | {"run.dir": f"{config['run.dir']}-other"} | changes


def assert_close(found: State, expected: State, within: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0.0, atol=within)


def differ(one: State, other: State) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


# The number of nodes, and seeds


@pytest.mark.parametrize(
    "method", ["sft", "lora", "slora", "bitfit", "houlsby", "pfeiffer"]
)
def test_nodes_do_not_change_the_result(config: Config, method: str) -> None:
    config |= {"method": method}
    one = RecordingGrid(config, nodes=1)
    first = start(config, one)
    config = elsewhere(config)
    six = RecordingGrid(config, nodes=6)
    second = start(config, six)
    assert {len(i.clients) for i in one.asked} == {6}
    assert {len(i.clients) for i in six.asked} == {1}
    assert not differ(final(second), final(first))
    assert payloads(second) == payloads(first)
    assert one.mean(3).abs().max() > 1e-4


class ShufflingGrid(RecordingGrid):
    """Replies come one a poll, in an order that a seed draws."""

    def __init__(self, config: Config, nodes: int, order: int) -> None:
        super().__init__(config, nodes)
        self.arrivals: list[int] = []
        self._draw = random.Random(order)
        self._ready: dict[str, Message] = {}

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        asked = list(message_ids)
        for reply in super().pull_messages(asked):
            self._ready[reply.metadata.reply_to_message_id] = reply
        reply = self._ready.pop(self._draw.choice(asked))
        if reply.metadata.message_type == MessageType.TRAIN:
            self.arrivals.append(reply.metadata.src_node_id)
        return [reply]


@pytest.mark.parametrize("method", ["sft", "lora", "slora"])
def test_the_order_of_replies_does_not_change_the_result(
    config: Config, method: str
) -> None:
    config |= {"method": method}
    grids, finals = [], []
    for order in range(3):
        config = elsewhere(config)
        grids.append(ShufflingGrid(config, 5, order))
        finals.append(final(start(config, grids[-1])))
    assert len({tuple(grid.arrivals) for grid in grids}) == 3
    assert not differ(finals[1], finals[0])
    assert not differ(finals[2], finals[0])


class CountingGrid(InlineGrid):
    """Twenty nodes that have answered whenever they are asked; counts live replies."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, nodes=20)
        self.most = 0
        self._replies: list[weakref.ref[Array]] = []

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            if reply.metadata.message_type == MessageType.TRAIN:
                self._replies.append(weakref.ref(Report.read(reply.content).update))
        self.most = max(self.most, sum(array() is not None for array in self._replies))
        return replies


def test_memory_does_not_grow_with_the_replies(config: Config) -> None:
    config |= {"clients.count": 20, "clients.per-round": 20, "rounds": 1}
    grid = CountingGrid(config)
    gc.disable()  # arrays are freed by reference counts, not by a lucky collection
    try:
        start(config, grid)
    finally:
        gc.enable()
    # Those pulled at once, and the one before them.
    assert 1 < grid.most <= 9


@pytest.mark.parametrize("mask", ["rows", "columns"])
def test_a_run_with_a_structured_mask(config: Config, mask: str) -> None:
    config |= {"method": "slora", "sparse.mask": mask}
    first = start(config, RecordingGrid(config, nodes=1))
    # 5% of 32 or 48 lines are 2; the head's values travel too.
    lines = {"rows": 4 * 64 + 2 * 32 + 2 * 48, "columns": 4 * 64 + 2 * 48 + 2 * 32}
    sent = LAYERS * lines[mask] + HEAD_VALUES
    assert payloads(first)[0] == (1, "sparse", "down", 6, 6 * 4 * sent)
    [handoff] = events(first, "handoff")
    assert all(energy == pytest.approx(1.0) for energy in handoff["energies"].values())
    config = elsewhere(config)
    assert not differ(
        final(start(config, RecordingGrid(config, nodes=3))), final(first)
    )


def test_nodes_do_not_change_a_warm_start(config: Config) -> None:
    config |= {"method": "slora", "lora.base": "warm-start"}
    first = start(config, RecordingGrid(config, nodes=1))
    config = elsewhere(config)
    second = start(config, RecordingGrid(config, nodes=5))
    assert not differ(final(second), final(first))


def test_a_seed_repeats_a_run_and_another_does_not(config: Config) -> None:
    config |= {"method": "slora", "clients.per-round": 3}
    states, cohorts = [], []
    for seed in (0, 0, 1):
        config = elsewhere(config, seed=seed)
        directory = start(config, RecordingGrid(config, nodes=2))
        states.append(final(directory))
        cohorts.append([e["cohort"] for e in events(directory, "round")])
    assert not differ(states[0], states[1])
    assert differ(states[0], states[2])
    assert cohorts[0] == cohorts[1] != cohorts[2]


# Bad replies


def set_to(**fields: Any) -> Tamper:
    def tamper(report: Report) -> None:
        for name, value in fields.items():
            setattr(report, name, value)

    return tamper


def nan(report: Report) -> None:
    spoilt = values(report).clone()
    spoilt[7] = float("nan")
    report.update = pack({"x": spoilt})


def huge(report: Report) -> None:
    spoilt = values(report).clone()
    spoilt[7] = 2**62
    report.update = pack({"x": spoilt}, report.update.dtype)


def longer(report: Report) -> None:
    spoilt = torch.zeros(len(values(report)) + 1)
    report.update = pack({"x": spoilt}, report.update.dtype)


def empty(report: Report) -> None:
    report.update = pack({}, report.update.dtype)


def other_kind(report: Report) -> None:
    array = report.update
    report.update = Array(array.dtype, array.shape, "numpy.ndarray", array.data)


def foreign(report: Report) -> None:
    report.clients = [client + 100 for client in report.clients]


def twice(report: Report) -> None:
    report.clients = [report.clients[0]] * len(report.clients)


def without(record: str) -> Tamper:
    def tamper(report: Report) -> RecordDict:
        content = report.content()
        del content[record]
        return content

    return tamper


def nameless(report: Report) -> RecordDict:
    content = report.content()
    del content.metric_records["metrics"]["examples"]
    return content


def unreasoned(report: Report) -> RecordDict:
    content = report.content()
    content.config_records["config"]["failed"] = [1, 2]
    return content


BAD: dict[str, tuple[Tamper, str]] = {
    "too-large": (huge, "is not finite or too large"),
    "too-long": (longer, "the array has shape"),
    "empty": (empty, "the array has shape (0,) and 0 bytes"),
    "other-kind": (other_kind, "the array is numpy.ndarray of "),
    "stale-round": (set_to(server_round=1), "its round is 1, not "),
    "other-phase": (set_to(phase=1), "its phase is 1, not 0"),
    "fingerprint": (set_to(fingerprint="f00d"), "its fingerprint is f00d, not "),
    "negative-weight": (set_to(examples=[-5, 32]), "its weights are [-5, 32]"),
    "zero-weight": (set_to(examples=[32, 0]), "its weights are [32, 0]"),
    "missing-weight": (set_to(examples=[32]), "its weights are [32]"),
    "no-clients": (set_to(clients=[]), "it answers for [], asked for "),
    "other-clients": (foreign, "it answers for [10"),
    "one-client-twice": (twice, "it answers twice for one of "),
    "payloads-missing": (set_to(payloads=[8]), "its payloads are [8]"),
    "wire-missing": (set_to(wire=[8]), "its wire bytes are [8]"),
    "negative-wire": (set_to(wire=[8, -8]), "its wire bytes are [8, -8]"),
    "negative-payload": (set_to(payloads=[-8, 8]), "its payloads are [-8, 8]"),
    "no-arrays": (without("arrays"), "records are off: KeyError('arrays')"),
    "no-metrics": (without("metrics"), "records are off: KeyError('metrics')"),
    "no-config": (without("config"), "records are off: KeyError('config')"),
    "no-examples": (nameless, "records are off: KeyError('examples')"),
}
# Of a node that trains a single client, whose update travels as it is.
BAD_ALONE: dict[str, tuple[Tamper, str]] = {
    "not-finite": (nan, "is not finite or too large"),
    "too-large": (huge, "is not finite or too large"),
    "too-long": (longer, "the array has shape"),
    "zero-weight": (set_to(examples=[0]), "its weights are [0]"),
}


def check_node_left_out(
    directory: Path, grid: RecordingGrid, reason: str, number: int = 2
) -> None:
    """Node 2's fault in a round is told, and the others' mean made the next state."""
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
    """One run of a bad reply of each kind, from round 2 on, and a good last round."""
    tampers = {n: tamper for n, (tamper, _) in enumerate(bad.values(), start=2)}
    config |= {"rounds": len(bad) + 2, "run.eval-every": 0}
    grid = RecordingGrid(config, nodes, tampers)
    return start(config, grid), grid


@pytest.fixture(scope="module")
def bad_rounds(
    corpus: Path,
    tiny_models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, RecordingGrid]:
    directory = tmp_path_factory.mktemp("bad-rounds")
    return hold_bad_rounds(make_config(corpus, tiny_models["bert"], directory), 3, BAD)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_reply_is_named_and_left_out(
    bad_rounds: tuple[Path, RecordingGrid], kind: str
) -> None:
    number = list(BAD).index(kind) + 2
    check_node_left_out(*bad_rounds, BAD[kind][1], number)


def test_only_bad_replies_are_left_out(bad_rounds: tuple[Path, RecordingGrid]) -> None:
    directory, _ = bad_rounds
    found = [failure["round"] for failure in events(directory, "failure")]
    assert found == list(range(2, len(BAD) + 2))


def test_a_bad_reply_of_one_client_is_named_and_left_out(config: Config) -> None:
    directory, grid = hold_bad_rounds(config, 6, BAD_ALONE)
    for number, (_, reason) in enumerate(BAD_ALONE.values(), start=2):
        check_node_left_out(directory, grid, reason, number)


# Replies whose records are well formed and whose figures cannot be true.
UNTRUE: dict[str, tuple[Tamper, str]] = {
    "weights-not-numbers": (set_to(examples=[float("nan")] * 2), "weights are [nan"),
    "weights-not-whole": (set_to(examples=[0.5, 0.5]), "its weights are [0.5, 0.5]"),
    "more-examples-than-it-has": (set_to(examples=[10**9] * 2), "are [1000000000, "),
    "losses-missing": (set_to(losses=[]), "its losses are []"),
    "losses-not-finite": (set_to(losses=[float("nan"), 1.0]), "losses are [nan, 1.0]"),
    "seconds-missing": (set_to(seconds=[]), "its seconds are []"),
    "failures-without-reasons": (unreasoned, "records are off"),
}


@pytest.mark.parametrize(("tamper", "reason"), UNTRUE.values(), ids=UNTRUE)
def test_a_reply_that_cannot_be_true_is_left_out(
    config: Config, tamper: Tamper, reason: str
) -> None:
    grid = RecordingGrid(config, nodes=3, tampers={2: tamper})
    check_node_left_out(start(config, grid), grid, reason)


def test_a_node_that_raises_is_named_and_left_out(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = RecordingGrid(config, nodes=3)
    train_client = Worker.train_client

    def fail(self: Worker, *args: Any) -> Trained:
        if grid.asked[-1].server_round == 2 and grid.asked_nodes[-1] == 2:
            raise OSError("no space left")
        return train_client(self, *args)

    monkeypatch.setattr(Worker, "train_client", fail)
    directory = start(config, grid)
    check_node_left_out(directory, grid, "error 0: OSError: no space left")


def test_one_client_that_fails_does_not_spoil_its_node(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_client = Worker.train_client

    def fail(self: Worker, client: int, *args: Any) -> Trained:
        if client == 4:
            raise ClientError("no examples")
        return train_client(self, client, *args)

    monkeypatch.setattr(Worker, "train_client", fail)
    grid = RecordingGrid(config, nodes=2)
    directory = start(config, grid)
    assert [
        (f["round"], f["clients"], f["reason"]) for f in events(directory, "failure")
    ] == [(r, [4], "no examples") for r in (1, 2, 3)]
    assert all(
        {int(c) for c in event["clients"]} == {0, 1, 2, 3, 5}
        for event in events(directory, "round")
    )
    expected = grid.sent(2) + grid.mean(2)
    torch.testing.assert_close(grid.sent(3), expected, rtol=0.0, atol=1e-7)


class SilentGrid(RecordingGrid):
    """Node 2 never answers round 2."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [
            reply
            for reply in super().pull_messages(message_ids)
            if (reply.metadata.group_id, reply.metadata.src_node_id) != ("2", 2)
        ]


def test_a_node_that_never_answers_is_left_out_at_the_deadline(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(collect, "time", clock)
    config |= {"clients.deadline": 9.0}
    grid = SilentGrid(config, nodes=3)
    directory = start(config, grid)
    # It did report, but nobody heard.
    heard = zip(grid.asked, grid.asked_nodes, grid.reports, strict=True)
    grid.reports = [r for i, at, r in heard if (i.server_round, at) != (2, 2)]
    check_node_left_out(directory, grid, "no reply before the deadline")
    assert clock.now == pytest.approx(9.0, abs=0.25)
    assert grid.queried == [1, 2, 3, 2]  # and again before it takes part again


def test_too_few_good_replies_twice_stop_the_run(config: Config) -> None:
    grid = RecordingGrid(config, 2, {2: huge}, bad=[1, 2])
    with pytest.raises(TooFewRepliesError, match="round 2 got 0 good replies twice"):
        run(grid, config, run_id=1)
    directory = Path(str(config["run.dir"]))
    assert [i.server_round for i in grid.asked] == [1, 1, 2, 2, 2, 2]
    assert len(events(directory, "failure")) == 4
    [stopped] = events(directory, "stopped")
    assert stopped["reason"].startswith("TooFewRepliesError: round 2 got 0 good")
    assert [e["round"] for e in events(directory, "round")] == [1]
    assert facts(directory, "last") == {"round": "1", "phase": "lora", "base": ""}
    worker = Worker(parse(config))
    shapes = worker.enter(worker.schedule[0]).shapes()
    expected = unpack(grid.asked[-1].state, shapes)
    assert_close(final(directory), expected, within=0.0)
    assert not (directory / "summary.json").exists()


def test_a_round_that_fails_once_is_held_again(config: Config) -> None:
    undisturbed = start(config, RecordingGrid(config, nodes=2))
    spoils = iter([huge, huge, set_to(), set_to()])
    config = elsewhere(config)
    grid = RecordingGrid(config, 2, {2: lambda r: next(spoils)(r)}, bad=[1, 2])
    directory = start(config, grid)
    assert [i.server_round for i in grid.asked] == [1, 1, 2, 2, 2, 2, 3, 3]
    assert not differ(final(directory), final(undisturbed))
    assert len(events(directory, "failure")) == 2


@pytest.mark.parametrize(("wanted", "enough"), [(4, True), (5, False)])
def test_min_replies_counts_clients(config: Config, wanted: int, enough: bool) -> None:
    config |= {"clients.min-replies": wanted}
    grid = RecordingGrid(config, nodes=3, tampers={2: huge})
    if enough:
        start(config, grid)
    else:
        with pytest.raises(TooFewRepliesError, match="got 4 good replies twice"):
            start(config, grid)


# The base of the second phase


class ForgetfulGrid(RecordingGrid):
    """In round 3, the second on the base, a node has lost what `loses` says."""

    loses: tuple[str, ...] = ("process", "disk")

    def before(self, asked: Instruction) -> None:
        if asked.server_round == 3 and asked.parcel.start is None:
            if "process" in self.loses:
                node._worker.cache_clear()
            if "disk" in self.loses:
                (cache_folder() / f"base-{asked.base}").unlink()


@pytest.fixture
def two_phases(config: Config) -> Config:
    return config | {"method": "slora", "rounds": 4, "sparse.rounds": 1}


@pytest.mark.parametrize("base", ["residual", "warm-start"])
def test_a_node_that_lost_the_base_is_sent_it_again(
    two_phases: Config, base: str
) -> None:
    two_phases |= {"lora.base": base}
    undisturbed = start(two_phases, RecordingGrid(two_phases))
    config = elsewhere(two_phases)
    grid = ForgetfulGrid(config)
    directory = start(config, grid)
    assert [(i.server_round, i.parcel.start is not None) for i in grid.asked] == [
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
    sent = [i.server_round for i in grid.asked if i.parcel.start is not None]
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
    assert all(i.parcel.start is None for i in grid.asked)


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


# Bytes


@pytest.mark.parametrize(
    ("method", "phase", "size"),
    [
        ("sft", "sparse", 4 * (SPARSE_VALUES + HEAD_VALUES)),
        ("lora", "lora", 4 * (LORA_VALUES + HEAD_VALUES)),
        ("head", "head", 4 * HEAD_VALUES),
    ],
)
def test_payload_bytes_follow_from_shapes(
    config: Config, method: str, phase: str, size: int
) -> None:
    config |= {"method": method, "rounds": 2, "clients.per-round": 4}
    directory = start(config, RecordingGrid(config, nodes=3))
    assert payloads(directory) == [
        (number, phase, direction, 4, 4 * size)
        for number in (1, 2)
        for direction in ("down", "up")
    ]
    told = summary(directory)
    assert told["payload_bytes_up"] == told["payload_bytes_down"] == 2 * 4 * size
    assert told["phases"][phase]["payload_bytes_up"] == 2 * 4 * size


@pytest.mark.parametrize(
    ("base", "base_values", "nodes"),
    [
        ("residual", SPARSE_VALUES + LORA_VALUES, 1),
        ("residual", SPARSE_VALUES + LORA_VALUES, 3),
        ("warm-start", SPARSE_VALUES, 2),
        ("w0", 0, 2),
    ],
)
def test_the_base_is_counted_once_per_client(
    config: Config, base: str, base_values: int, nodes: int
) -> None:
    config |= {"method": "slora", "rounds": 4, "clients.per-round": 4}
    config |= {"lora.base": base}
    directory = start(config, RecordingGrid(config, nodes=nodes))
    cohorts = [set(event["cohort"]) for event in events(directory, "round")]
    seen: set[int] = set()
    sparse, lora = 4 * (SPARSE_VALUES + HEAD_VALUES), 4 * (LORA_VALUES + HEAD_VALUES)
    expected = [
        (1, "sparse", "down", 4, 4 * sparse),
        (1, "sparse", "up", 4, 4 * sparse),
    ]
    for number in (2, 3, 4):
        new = cohorts[number - 1] - seen
        seen |= new
        down = 4 * lora + len(new) * 4 * base_values
        expected += [(number, "lora", "down", 4, down)]
        expected += [(number, "lora", "up", 4, 4 * lora)]
    assert payloads(directory) == expected
    assert 4 < len(seen) <= 6


def test_message_bytes_are_those_of_the_messages(two_phases: Config) -> None:
    grid = RecordingGrid(two_phases, nodes=3)
    directory = start(two_phases, grid)
    for row in ledger(directory):
        number, told = int(row["round"]), int(row["message_bytes"])
        if row["direction"] == "down":
            found = sum(
                size
                for i, size in zip(grid.asked, grid.asked_bytes, strict=True)
                if i.server_round == number
            )
            # The link adds an id to each of the three messages.
            assert 0 <= found - told <= 3 * 10
        else:
            updates = [r for r in grid.reports if r.server_round == number]
            least = sum(len(r.update.data) for r in updates)
            assert least < told < least + 3 * 1500


# The run directory


def by_client(reports: list[Report], name: str) -> dict[int, Any]:
    return {
        client: value
        for report in reports
        for client, value in zip(report.clients, getattr(report, name), strict=True)
    }


def test_a_run_writes_what_it_was_and_what_came_of_it(two_phases: Config) -> None:
    grid = RecordingGrid(two_phases, nodes=2)
    directory = start(two_phases, grid)

    written = tomllib.loads((directory / "config.toml").read_text())
    versions, resolved = written.pop("versions"), written.pop("resolved")
    flat: Config = {}
    for key, value in written.items():
        inner = value.items() if isinstance(value, dict) else [(None, value)]
        flat |= {f"{key}.{name}" if name else key: found for name, found in inner}
    assert flat == flatten(parse(two_phases))
    assert versions["flwr"] == version("flwr")
    assert versions["torch"] == version("torch")
    assert versions["python"].startswith("3.")
    assert len(resolved["backbone_digest"]) == 32
    assert resolved["classes"] == CLASSES
    assert resolved["train_examples"] + resolved["test_examples"] == 160
    assert resolved["phases"] == [
        {"adapter": "sparse", "rounds": 1, "lr": 0.01},
        {"adapter": "lora", "rounds": 3, "lr": 0.002},
    ]

    told = summary(directory)
    figures = {"accuracy", "macro_f1", "loss", "seconds"}
    counts = {f"{u}_bytes_{d}" for u in ("payload", "message") for d in ("up", "down")}
    assert told.keys() >= {"method", "rounds", "majority_accuracy"} | figures | counts
    assert (told["method"], told["rounds"]) == ("slora", 4)
    assert list(told["phases"]) == ["sparse", "lora"]
    assert [p["rounds"] for p in told["phases"].values()] == [1, 3]
    for count in counts:
        assert told[count] == sum(p[count] for p in told["phases"].values()) > 0
    assert all(phase.keys() >= figures for phase in told["phases"].values())

    rounds = events(directory, "round")
    assert [(e["round"], e["phase"]) for e in rounds] == [
        (1, "sparse"),
        (2, "lora"),
        (3, "lora"),
        (4, "lora"),
    ]
    assert told["accuracy"] == rounds[-1]["accuracy"]
    assert told["phases"]["sparse"]["accuracy"] == rounds[0]["accuracy"]
    for event in rounds:
        of_round = [r for r in grid.reports if r.server_round == event["round"]]
        sizes = by_client(of_round, "examples")
        losses = by_client(of_round, "losses")
        found = event["clients"]
        assert {int(c): facts["examples"] for c, facts in found.items()} == sizes
        assert {int(c): facts["loss"] for c, facts in found.items()} == losses
        mean = sum(losses[c] * sizes[c] for c in sizes) / sum(sizes.values())
        assert event["train_loss"] == pytest.approx(mean)

    [handoff] = events(directory, "handoff")
    assert handoff["base"] == "residual"
    assert len(handoff["energies"]) == 6 * LAYERS
    assert all(0 < energy <= 1 for energy in handoff["energies"].values())


def test_checkpoints_hold_the_last_and_the_best_state(config: Config) -> None:
    config |= {"lora.lr": 0.02}
    directory = start(config, RecordingGrid(config))
    accuracies = [event["accuracy"] for event in events(directory, "round")]
    best = accuracies.index(max(accuracies)) + 1
    assert facts(directory, "last") == {"round": "3", "phase": "lora", "base": ""}
    assert facts(directory, "best") == {"round": str(best), "phase": "lora", "base": ""}
    worker = Worker(parse(config))
    worker.enter(worker.schedule[0])
    found = [worker.evaluate_test(final(directory, name)) for name in ("last", "best")]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].accuracy == pytest.approx(accuracies[-1])
    assert found[1].accuracy == pytest.approx(max(accuracies))


def test_a_directory_in_use_is_refused_before_any_client_is_asked(
    config: Config,
) -> None:
    directory = Path(str(config["run.dir"]))
    directory.mkdir()
    (directory / "notes.txt").write_text("mine")
    grid = RecordingGrid(config)
    with pytest.raises(ConfigError, match=r"run\.dir is .*new or empty folder"):
        run(grid, config, run_id=1)
    assert grid.asked == []
    assert [path.name for path in directory.iterdir()] == ["notes.txt"]


# Evaluation


def test_clients_evaluate_on_what_they_hold_out(config: Config) -> None:
    trained_on = RecordingGrid(config, nodes=2)
    start(config, trained_on)
    config = elsewhere(config, **{"clients.holdout": 0.25})
    grid = RecordingGrid(config, nodes=2)
    directory = start(config, grid)
    all_sizes = [n for r in trained_on.reports[:2] for n in r.examples]
    sizes = [n for r in grid.reports[:2] for n in r.examples]
    assert sizes == [n - round(n / 4) for n in all_sizes]
    for number, event in enumerate(events(directory, "round")):
        one, other = grid.evaluations[2 * number : 2 * number + 2]
        weights = one["num-examples"], other["num-examples"]
        assert sum(weights) == sum(round(n / 4) for n in all_sizes)
        mean = (weights[0] * one["loss"] + weights[1] * other["loss"]) / sum(weights)
        assert event["client_loss"] == pytest.approx(mean)
        hits = sum(one["hits"]) + sum(other["hits"])
        assert event["client_accuracy"] == pytest.approx(hits / sum(weights))
        assert 0 <= event["client_accuracy"] <= 1


def test_without_a_holdout_clients_do_not_evaluate(config: Config) -> None:
    grid = RecordingGrid(config)
    directory = start(config, grid)
    assert grid.evaluations == []
    assert all("client_accuracy" not in e for e in events(directory, "round"))


class BadEvaluationGrid(RecordingGrid):
    """Node 2 answers evaluations without figures, or never."""

    silent = False

    def _answer(self, message: Message) -> Message:
        reply = super()._answer(message)
        if self._is_meant(reply):
            reply.content = RecordDict({"other": ConfigRecord({"x": 1})})
        return reply

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = super().pull_messages(message_ids)
        return [r for r in replies if not (self.silent and self._is_meant(r))]

    def _is_meant(self, reply: Message) -> bool:
        facts = reply.metadata
        return (facts.message_type, facts.src_node_id) == (MessageType.EVALUATE, 2)


@pytest.mark.parametrize("silent", [False, True])
def test_a_bad_evaluation_is_named_and_left_out(
    config: Config, monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    monkeypatch.setattr(collect, "time", Clock())
    config |= {"clients.holdout": 0.25}
    grid = BadEvaluationGrid(config, nodes=2)
    grid.silent = silent
    directory = start(config, grid)
    assert [(f["round"], f["node"]) for f in events(directory, "failure")] == [
        (1, 2),
        (2, 2),
        (3, 2),
    ]
    assert all("client_accuracy" in e for e in events(directory, "round"))


def test_evaluation_can_wait_for_the_end_of_a_phase(two_phases: Config) -> None:
    two_phases |= {"run.eval-every": 0}
    directory = start(two_phases, RecordingGrid(two_phases))
    evaluated = [e["round"] for e in events(directory, "round") if "accuracy" in e]
    assert evaluated == [1, 4]


def test_the_summary_names_the_first_round_at_the_target(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = iter([0.4, 0.7, 0.6])

    def evaluate(self: Worker, state: State) -> Evaluation:
        hits = round(10 * next(accuracies))
        return Evaluation(1.0, np.array([[hits, 0, 0], [10, 0, 0], [10, 0, 0]]))

    monkeypatch.setattr(Worker, "evaluate_test", evaluate)
    config |= {"run.target": 0.6}
    target = summary(start(config, RecordingGrid(config)))["target"]
    assert target["round"] == 2
    assert target["payload_bytes"] == 2 * 2 * 6 * 4 * (LORA_VALUES + HEAD_VALUES)


def test_a_target_that_is_not_reached_is_not_in_the_summary(config: Config) -> None:
    config |= {"run.target": 1.0, "rounds": 1, "lora.lr": 1e-9}
    assert "target" not in summary(start(config, RecordingGrid(config)))


# The server optimiser


def test_momentum_starts_anew_after_the_handoff(two_phases: Config) -> None:
    two_phases |= {"server.optimizer": "fedavgm", "server.lr": 0.5}
    grid = RecordingGrid(two_phases, nodes=2)
    start(two_phases, grid)
    assert grid.mean(2).abs().max() > 1e-4
    expected = {
        3: grid.sent(2) + 0.5 * grid.mean(2),
        4: grid.sent(3) + 0.5 * (0.9 * grid.mean(2) + grid.mean(3)),
    }
    for number, state in expected.items():
        torch.testing.assert_close(grid.sent(number), state, rtol=0.0, atol=1e-6)


class MortalGrid(RecordingGrid):
    """In round 2 the SuperLink answers for node 2, under its own id."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for reply in super().pull_messages(message_ids):
            metadata = reply.metadata
            if (metadata.src_node_id, metadata.group_id) != (2, "2"):
                yield reply
                continue
            gone = Message(Error(3, "node unavailable"), reply_to=reply)
            gone.metadata.__dict__["_src_node_id"] = 1
            gone.metadata.__dict__["_reply_to_message_id"] = (
                metadata.reply_to_message_id
            )
            yield gone


def test_a_node_that_is_gone_is_named_though_the_superlink_answers(
    config: Config,
) -> None:
    grid = MortalGrid(config, nodes=3, tampers={2: lambda report: None})
    check_node_left_out(start(config, grid), grid, "node unavailable")
    assert grid.queried == [1, 2, 3, 2]


def test_a_process_that_has_trained_describes_the_untrained_backbone(
    two_phases: Config,
) -> None:
    grid = RecordingGrid(two_phases)
    resolved = tomllib.loads((start(two_phases, grid) / "config.toml").read_text())
    node._worker(parse(two_phases), ()).backbone.__dict__.pop("digest")
    query = Message(RecordDict(), dst_node_id=1, message_type=MessageType.QUERY)
    [number] = grid.push_messages([query])
    [reply] = grid.pull_messages([number])
    described = reply.content.config_records["config"]
    assert described["backbone"] == resolved["resolved"]["backbone_digest"]


def test_count_zero_is_one_client_for_each_node(config: Config) -> None:
    config = {**config, "clients.count": 0, "clients.per-round": 3}
    grid = RecordingGrid(config, nodes=3)
    start(config, grid)
    pairs = zip(grid.asked_nodes, grid.asked, strict=True)
    assert {(at, *asked.clients) for at, asked in pairs} == {(1, 0), (2, 1), (3, 2)}
