"""Whole runs with secure aggregation: equal to plain sums, whoever drops out."""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Error, Message, MessageType

from slora_flwr.aggregation.mean import FoldError
from slora_flwr.aggregation.ring_sum import grid_of
from slora_flwr.client.process import make_process
from slora_flwr.config import ConfigError, parse
from slora_flwr.config.methods import METHODS, find_aggregator
from slora_flwr.engines.inline import InlineGrid
from slora_flwr.secure import member, tally
from slora_flwr.server.phase import ActivePhase
from slora_flwr.server.strategy import TooFewRepliesError
from slora_flwr.training.trainer import ClientUpdate, Trainer
from slora_flwr.wire.messages import Instruction
from slora_flwr.wire.secure_messages import (
    INTRODUCE,
    KEYS,
    TELL,
    Introduction,
    MaskedReport,
)
from tests.support.grids import Grid
from tests.support.resuming import InterruptionError, resumed
from tests.support.runs import (
    Config,
    differ,
    elsewhere,
    events,
    final,
    ledger,
    start,
    summary,
)
from tests.support.secure import SECURE

TRAIN = MessageType.TRAIN
# Those whose result is a function of the mean alone.
ALLOWED: dict[str, Config] = {
    "slora": {"method": "slora"},
    "slora-ffa": {"method": "slora", "lora.aggregator": "ffa"},
    "slora-w0": {"method": "slora", "lora.base": "w0"},
    "per-round": {"method": "sft", "sparse.schedule": "per-round"},
    "fedadam": {"method": "lora", "server.optimizer": "fedadam"},
    "int8": {"method": "slora", "upload.dtype": "int8"},
    "no-feedback": {"method": "slora", "upload.feedback": False},
    **{m: {"method": m} for m in METHODS if m not in ("fedex-lora", "flexlora")},
}
# Masks know no method, only the states' sizes: one for each kind of state.
MASKED = [name for name in ALLOWED if name not in ("sft", "bitfit", "pfeiffer", "head")]


class SecretGrid(Grid):
    """Nodes of whose answers some are lost: by round and kind of message, whose."""

    def __init__(
        self,
        config: Config,
        nodes: int = 4,
        lost: Mapping[tuple[int, str], Collection[int]] | None = None,
        stop: int = 0,
    ) -> None:
        super().__init__(config, nodes)
        self.kinds: list[str] = []
        self.masked: list[MaskedReport] = []
        self.replies: list[Message] = []
        self._lost, self._stop, self._round = lost or {}, stop, 0

    def _answer(self, message: Message) -> Message:
        kind, node = message.metadata.message_type, message.metadata.dst_node_id
        self.kinds.append(kind)
        if message.metadata.group_id:
            self._round = int(message.metadata.group_id)
        if kind == TRAIN:
            self.asked.append(Instruction.read(message.content))
        reply = InlineGrid._answer(self, message)
        if kind == TRAIN and self._round == self._stop:
            raise InterruptionError
        if node in self._lost.get((self._round, kind), ()):
            return Message(Error(0, "lost"), reply_to=message)
        self.replies.append(reply)
        if kind == TRAIN and not reply.has_error():
            self.masked.append(MaskedReport.read(reply.content))
        return reply


@pytest.fixture
def secure(config: Config) -> Config:
    return config | SECURE


@pytest.fixture
def plain_run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that holds a run of the same numbers without masks."""

    def hold(config: Config, **options: Any) -> Path:
        with monkeypatch.context() as patched:
            for module in (member, tally):
                patched.setattr(module, "add_mask", lambda *_: None)
            given = elsewhere(config)
            return start(given, SecretGrid(given, **options))

    return hold


def assert_same(one: Path, other: Path) -> None:
    for state in sorted((one / "checkpoints").glob("*.safetensors")):
        assert not differ(final(one, state.stem), final(other, state.stem)), state.stem
    assert summary(one)["loss"] == summary(other)["loss"]
    losses = [
        [event["train_loss"] for event in events(directory, "round")]
        for directory in (one, other)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", MASKED)
def test_masks_change_nothing(secure: Config, plain_run: Any, name: str) -> None:
    config = secure | ALLOWED[name]
    grid = SecretGrid(config)
    masked = start(config, grid)
    plain = plain_run(config)
    assert_same(masked, plain)
    # Nor did the masked run send what the plain one did.
    assert len(grid.masked) == 3 * 4
    for report in grid.masked:
        halves = np.frombuffer(report.masked[: len(report.masked) // 8 * 8], "<u2")
        assert len(np.unique(halves)) > len(halves) / 4


# By kind of message, whose answers of the first round are lost.
DROPOUTS: dict[str, dict[tuple[int, str], set[int]]] = {
    "before sharing": {(1, INTRODUCE): {2}},
    "in training": {(1, TRAIN): {3}},
    "before telling": {(1, TELL): {1}},
    "at each stage": {(1, INTRODUCE): {5}, (1, TRAIN): {2}, (2, TELL): {3, 4}},
}


@pytest.mark.parametrize(
    ("name", "stage"),
    [*(("slora", stage) for stage in DROPOUTS), ("ffa-lora", "at each stage")],
)
def test_whoever_drops_out_the_sum_is_that_of_the_others(
    secure: Config, plain_run: Any, name: str, stage: str
) -> None:
    config = secure | ALLOWED[name] | {"clients.count": 12, "clients.per-round": 12}
    options: dict[str, Any] = {"nodes": 6, "lost": DROPOUTS[stage]}
    directory = start(config, SecretGrid(config, **options))
    assert_same(directory, plain_run(config, **options))
    lost = {
        node
        for (number, kind), nodes in DROPOUTS[stage].items()
        for node in nodes
        if number == 1 and kind != TELL
    }
    first = events(directory, "round")[0]
    assert first["replied"] == 12 - 2 * len(lost)
    failed = events(directory, "failure")
    assert {e["node"] for e in failed if e["round"] == 1} == lost


def test_whom_a_node_that_refuses_was_introduced_to_is_told(
    secure: Config, caplog: pytest.LogCaptureFixture
) -> None:
    """It knows them by their numbers, which follow the nodes' ids."""
    config = secure | {"rounds": 1}
    start(config, SecretGrid(config, lost={(1, INTRODUCE): {2}}))
    told = "node 2 was introduced to members 0 node 1, 2 node 3, 3 node 4"
    assert caplog.text.count("was introduced to members") == 1
    assert told in caplog.text


def test_a_mean_is_that_of_plain_updates_within_the_grids_steps(config: Config) -> None:
    config |= {"rounds": 1, "server.average": "none", "clients.max-weight": 100}
    plain = start(config, Grid(config))
    coded = elsewhere(config) | SECURE
    masked = start(coded, SecretGrid(coded))
    own, other = final(plain), final(masked)
    shapes = {name: tensor.shape for name, tensor in own.items()}
    grid = grid_of(parse(coded), "sparse", shapes)
    error = torch.cat([(own[name] - other[name]).flatten() for name in own])
    # Each value is within a step after the rotation, which keeps lengths; those of six
    # clients partly cancel. float32 holds the states themselves to 1e-7.
    assert 0 < float(error.norm()) < grid.step * grid.size**0.5
    assert grid.step < 1e-5


def test_what_is_clipped_has_the_bound_as_its_norm(config: Config) -> None:
    config |= {"rounds": 1, "server.average": "none", "upload.feedback": False}
    config |= SECURE | {"secure.clip": 0.01}
    still = config | {"train.lr": 1e-12}
    before = start(still, SecretGrid(still))
    config = elsewhere(config)
    after = start(config, SecretGrid(config))
    one, other = final(before), final(after)
    moved = torch.cat([(other[name] - one[name]).flatten() for name in one])
    assert 0.002 < float(moved.norm()) <= 0.0101


def test_too_few_answers_end_the_attempt_and_keys_are_fresh(secure: Config) -> None:
    """Of the first attempt nobody is asked for shares."""
    lost: dict[tuple[int, str], set[int]] = {(2, INTRODUCE): {1, 2, 3}}

    class OnceGrid(SecretGrid):
        def _answer(self, message: Message) -> Message:
            reply = super()._answer(message)
            if reply.has_error() and self._round == 2:
                lost[2, INTRODUCE].discard(message.metadata.dst_node_id)
            return reply

    grid = OnceGrid(secure, lost=lost)
    directory = start(secure, grid)
    assert summary(directory)["loss"] > 0
    rounds = events(directory, "round")
    assert [done["replied"] for done in rounds] == [6, 6, 6]
    assert grid.kinds.count(TELL) == 12
    assert grid.kinds.count(TRAIN) == 12


def test_a_round_below_the_threshold_is_never_read(secure: Config) -> None:
    lost = {(2, TRAIN): {1, 2}}
    grid = SecretGrid(secure, lost=lost)
    with pytest.raises(TooFewRepliesError, match=r"round 2 has no sum: 2 of the 4"):
        start(secure, grid)
    # Only those of the first round were asked for shares.
    assert grid.kinds.count(TELL) == 4
    last = max(i for i, kind in enumerate(grid.kinds) if kind == TELL)
    assert grid.kinds[last + 1 :].count(TRAIN) == 8


def test_a_resumed_run_is_the_unbroken_one(secure: Config) -> None:
    config = secure | {"method": "slora", "upload.dtype": "int8", "rounds": 4}
    unbroken = start(config, SecretGrid(config))
    broken = elsewhere(config)
    make_process.cache_clear()
    with pytest.raises(InterruptionError):
        start(broken, SecretGrid(broken, stop=3))
    make_process.cache_clear()
    again = start(resumed(broken), SecretGrid(resumed(broken)))
    assert_same(unbroken, again)


def test_files_tell_nothing_of_single_clients(secure: Config) -> None:
    grid = SecretGrid(secure)
    directory = start(secure, grid)
    for done in events(directory, "round"):
        assert done["clients"] == {}
        assert done["replied"] == 6
        assert done["train_loss"] > 0
    for reply in grid.replies:
        if reply.metadata.message_type != TRAIN:
            continue
        assert not reply.content.metric_records
        assert {*reply.content.config_records["config"]} == {
            "server-round",
            "phase",
            "fingerprint",
            "clients",
        }


def test_the_log_says_how_norms_stand_to_the_bound(
    secure: Config, caplog: pytest.LogCaptureFixture
) -> None:
    """Against the norms of the updates that clients trained."""
    norms: list[float] = []
    config = secure | {"rounds": 1}
    train_client = Trainer.train_client
    with pytest.MonkeyPatch.context() as patched:

        def measure(self: Trainer, *given: Any) -> ClientUpdate:
            turn = train_client(self, *given)
            flat = torch.cat([t.flatten() for t in turn.update.values()])
            norms.append(float(flat.norm()))
            return turn

        patched.setattr(Trainer, "train_client", measure)
        start(config, SecretGrid(config))
    mean = sum(norms) / 6
    assert f"updates have a mean norm of {mean:.3g}, of 4 allowed" in caplog.text
    short = elsewhere(config) | {"secure.clip": min(norms) / 2}
    start(short, SecretGrid(short))
    assert "6 of 6 updates were longer than" in caplog.text


def test_bytes_of_a_round(secure: Config) -> None:
    """By hand: the ring of 6 x 100 examples at int8's 127 levels has 24 bits."""
    config = secure | {"upload.dtype": "int8"}
    directory = start(config, SecretGrid(config))
    size = grid_of(
        parse(config), "lora", {n: t.shape for n, t in final(directory).items()}
    ).size
    up = [row for row in ledger(directory) if row["direction"] == "up"]
    trained = [int(row["payload_bytes"]) for row in up if int(row["clients"])]
    # Of six clients on four nodes, each counted as a node of its own.
    assert trained == 3 * [6 * (3 * size + 5 * 8)]
    planned = [int(row["planned_payload_bytes"]) for row in up if int(row["clients"])]
    assert planned == trained


REFUSED: dict[str, tuple[Config, str]] = {
    "holdout": ({"clients.holdout": 0.2}, "clients.holdout is 0.2; allowed: 0,"),
    "robust": ({"server.robust": "median"}, "server.robust is 'median'; allowed: none"),
    "ranks": ({"lora.ranks": "1,2"}, "lora.ranks is '1,2'; allowed: empty"),
    "top-k": ({"upload.top-k": 0.1}, "upload.top-k is 0.1; allowed: 0"),
    "lossless": ({"upload.lossless": True}, "upload.lossless is True; allowed: false"),
    "fedex": ({"method": "fedex-lora"}, "exact needs each client's update"),
    "flexlora": (
        {"method": "lora", "lora.aggregator": "flexlora"},
        "flexlora needs each client's update",
    ),
    "clip": ({"secure.clip": 0.0}, "secure.clip is 0.0; allowed: above 0"),
    "weight": ({"clients.max-weight": 0}, "clients.max-weight is 0; allowed: 1 to"),
    "heavy": (
        {"clients.max-weight": 10**6},
        f"allowed: 1 to {(2**31 - 1) // (2**15 * 6)},",
    ),
    "alone": ({"clients.per-round": 1, "clients.min-replies": 1}, "at least 2"),
    "nodes": ({"clients.min-nodes": 1}, "clients.min-nodes is 1; allowed: at least 2"),
    "threshold": ({"secure.threshold": 0.4}, "secure.threshold"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_sums_alone_cannot_do_is_refused(secure: Config, name: str) -> None:
    changes, told = REFUSED[name]
    with pytest.raises(ConfigError) as refused:
        parse(secure | changes)
    assert told in str(refused.value)


def test_all_that_need_each_update_are_refused() -> None:
    assert {"exact", "flexlora"} == {
        name
        for name in ("fedavg", "ffa", "alternate", "exact", "flexlora")
        if find_aggregator(name).fold.needs_each
    }


def test_why_a_client_failed_stays_on_its_node(
    secure: Config, caplog: pytest.LogCaptureFixture
) -> None:
    """The reason holds its loss."""
    config = secure | {"attack.kind": "scaled-update", "attack.scale": 1e39}
    config |= {"attack.share": 1.0}
    with pytest.raises(TooFewRepliesError):
        start(config, SecretGrid(config))
    failed = events(Path(str(config["run.dir"])), "failure")
    assert failed
    assert not any("loss" in event["reason"] for event in failed)
    assert "the update is not finite (loss" in caplog.text


def test_one_node_with_a_state_of_its_own_gives_no_sum(secure: Config) -> None:
    """Else the others' states could teach nothing, and the sum be its update alone."""

    class LyingGrid(SecretGrid):
        def _answer(self, message: Message) -> Message:
            kind, node = message.metadata.message_type, message.metadata.dst_node_id
            if kind == TRAIN and node == 2:
                told = Instruction.read(message.content)
                values = np.frombuffer(told.state.data, "<f4").copy()
                values[0] += 1e-3
                told.state.data = values.tobytes()
                message.content = told.content()
            return super()._answer(message)

    with pytest.raises(TooFewRepliesError, match=r"figures that cannot be|has norm"):
        start(secure, LyingGrid(secure))


@pytest.mark.parametrize(
    ("name", "download"),
    [
        *(("slora", "int8"), ("slora", "bfloat16"), ("ffa-lora", "float32")),
        *(("ffa-lora", "int8"), ("alternate-lora", "int8")),
    ],
)
def test_all_read_the_same_state_however_it_is_coded(
    secure: Config, plain_run: Any, name: str, download: str
) -> None:
    """Else what a lost node had masked could not be taken away."""
    config = secure | ALLOWED[name] | {"download.dtype": download, "rounds": 4}
    config |= {"download.lossless": True, "clients.per-round": 4}
    options: dict[str, Any] = {"lost": {(2, TRAIN): {3}, (4, TRAIN): {1}}}
    directory = start(config, SecretGrid(config, **options))
    assert_same(directory, plain_run(config, **options))


def test_garbage_is_noticed_by_its_length(secure: Config) -> None:
    class SpoiledGrid(SecretGrid):
        def _answer(self, message: Message) -> Message:
            reply = super()._answer(message)
            kind, node = message.metadata.message_type, message.metadata.dst_node_id
            if kind == TRAIN and node == 2:
                report = MaskedReport.read(reply.content)
                figures = report.masked[-40:]  # as they were
                made = np.random.default_rng(0)
                report.masked = made.bytes(len(report.masked) - 40) + figures
                reply.content = report.content()
            return reply

    with pytest.raises(TooFewRepliesError, match="the mean update has norm"):
        start(secure, SpoiledGrid(secure))


def test_a_sum_of_too_few_clients_is_not_read_before_the_round_is_held_again(
    secure: Config,
) -> None:
    """Else the two sums would differ by the update of who was lost once."""
    config = secure | {"clients.min-replies": 6, "rounds": 1}

    class OnceGrid(SecretGrid):
        def _answer(self, message: Message) -> Message:
            reply = super()._answer(message)
            if reply.has_error():
                lost.clear()
            return reply

    lost = {(1, TRAIN): {1}}
    grid = OnceGrid(config, lost=lost)
    directory = start(config, grid)
    assert [done["replied"] for done in events(directory, "round")] == [6]
    assert (grid.kinds.count(TRAIN), grid.kinds.count(TELL)) == (8, 4)


def test_a_round_whose_sum_was_read_is_not_held_again(
    secure: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise FoldError("its values are not finite")

    monkeypatch.setattr(ActivePhase, "step", refuse)
    grid = SecretGrid(secure)
    with pytest.raises(TooFewRepliesError, match=r"round 1 ended without .* finite;"):
        start(secure, grid)
    assert (grid.kinds.count(TRAIN), grid.kinds.count(TELL)) == (4, 4)


ODD: dict[str, Any] = {
    "number": 7,
    "fraction": 1.5,
    "text": "k" * 64,
    "list": [1] * 64,
    "low": bytes(range(32)) + bytes(32),
    "same": bytes(range(32)) * 2,
}


@pytest.mark.parametrize("name", [*ODD, "another's"])
def test_a_node_with_odd_keys_is_left_out_alone(secure: Config, name: str) -> None:
    class OddGrid(SecretGrid):
        first: Any = b""

        def _answer(self, message: Message) -> Message:
            reply = super()._answer(message)
            node = message.metadata.dst_node_id
            if message.metadata.message_type == MessageType.QUERY:
                config = reply.content.config_records["config"]
                OddGrid.first = OddGrid.first or config[KEYS]
                if node == 2:
                    config[KEYS] = ODD.get(name, OddGrid.first)
            return reply

    directory = start(secure, OddGrid(secure))
    failed = events(directory, "failure")
    assert {event["node"] for event in failed} == {2}
    assert [done["replied"] for done in events(directory, "round")] == [5, 5, 5]


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e300, -1.0])
def test_an_odd_loss_costs_its_client_alone_or_nothing(
    secure: Config, monkeypatch: pytest.MonkeyPatch, loss: float
) -> None:
    train_client = Trainer.train_client

    def odd(self: Trainer, client: int, *given: Any) -> ClientUpdate:
        turn = train_client(self, client, *given)
        return replace(turn, loss=loss) if client == 3 else turn

    monkeypatch.setattr(Trainer, "train_client", odd)
    directory = start(secure, SecretGrid(secure))
    there = 6 if math.isfinite(loss) else 5
    assert [done["replied"] for done in events(directory, "round")] == 3 * [there]


def test_of_two_nodes_one_that_does_not_share_ends_the_attempt(secure: Config) -> None:
    config = secure | {"rounds": 1}
    grid = SecretGrid(config, nodes=2, lost={(1, INTRODUCE): {2}})
    with pytest.raises(TooFewRepliesError, match="too few members shared: 1 of 2"):
        start(config, grid)
    assert TRAIN not in grid.kinds


def test_keys_are_used_once(secure: Config) -> None:
    """The server names keys again that a node has used, or that are not its own."""

    class StaleGrid(SecretGrid):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.first: dict[int, bytes] = {}

        def _answer(self, message: Message) -> Message:
            node = message.metadata.dst_node_id
            if message.metadata.message_type == INTRODUCE:
                told = Introduction.read(message.content)
                if node == 3:
                    told.own = self.first.setdefault(node, told.own)
                    message.content = told.content()
            return super()._answer(message)

    directory = start(secure, StaleGrid(secure))
    failed = events(directory, "failure")
    assert [event["node"] for event in failed] == [3, 3]
    assert all("were used" in event["reason"] for event in failed)
    assert [done["replied"] for done in events(directory, "round")] == [6, 4, 4]
