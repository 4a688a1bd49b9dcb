"""Bad replies, and nodes that fail: named and left out, or the end of the run."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, Error, Message, RecordDict

from slora_flwr.config import parse
from slora_flwr.server import collect
from slora_flwr.server.run import run
from slora_flwr.server.strategy import TooFewRepliesError
from slora_flwr.training.trainer import ClientError, ClientUpdate, Trainer
from slora_flwr.wire.messages import Report
from slora_flwr.wire.packing import pack, unpack
from tests.support.clock import Clock
from tests.support.grids import RecordingGrid, Tamper, put, set_to, values
from tests.support.left_out import check_node_left_out, hold_bad_rounds, huge
from tests.support.runs import (
    Config,
    assert_close,
    differ,
    elsewhere,
    events,
    facts,
    final,
    make_config,
    start,
)


def nan(report: Report) -> None:
    spoilt = values(report).clone()
    spoilt[7] = float("nan")
    report.update = pack({"x": spoilt})


def longer(report: Report) -> None:
    put(report, torch.zeros(len(values(report)) + 1))


def empty(report: Report) -> None:
    put(report, torch.zeros(0))


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
    "too-long": (longer, "with shape "),
    "empty": (empty, "with shape (0,), not "),
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
    "too-long": (longer, "with shape "),
    "zero-weight": (set_to(examples=[0]), "its weights are [0]"),
}


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
    train_client = Trainer.train_client

    def fail(self: Trainer, *args: Any) -> ClientUpdate:
        if grid.asked[-1].server_round == 2 and grid.asked_nodes[-1] == 2:
            raise OSError("no space left")
        return train_client(self, *args)

    monkeypatch.setattr(Trainer, "train_client", fail)
    directory = start(config, grid)
    check_node_left_out(directory, grid, "error 0: OSError: no space left")


def test_one_client_that_fails_does_not_spoil_its_node(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_client = Trainer.train_client

    def fail(self: Trainer, client: int, *args: Any) -> ClientUpdate:
        if client == 4:
            raise ClientError("no examples")
        return train_client(self, client, *args)

    monkeypatch.setattr(Trainer, "train_client", fail)
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
    config |= {"clients.deadline": 60.0}
    grid = SilentGrid(config, nodes=3)
    directory = start(config, grid)
    # It did report, but nobody heard.
    heard = zip(grid.asked, grid.asked_nodes, grid.reports, strict=True)
    grid.reports = [r for i, at, r in heard if (i.server_round, at) != (2, 2)]
    check_node_left_out(directory, grid, "no reply before the deadline")
    assert clock.now == pytest.approx(60.0, abs=0.25)
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
    trainer = Trainer(parse(config))
    shapes = trainer.model.attach(trainer.schedule[0]).shapes()
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
