"""A node works for a round no longer than the server waits for it."""

from pathlib import Path

import pytest
from flwr.app import Message, MessageType
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

from slora_flwr.engines.inline import InlineGrid
from slora_flwr.tasks import classification
from tests.support.grids import Grid
from tests.support.runs import Config, make_config, start


class KeepingGrid(Grid):
    """Keeps the last instruction to train and to evaluate."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.kept: dict[str, bytes] = {}
        self.seconds = 10.0

    def _answer(self, message: Message) -> Message:
        kind = message.metadata.message_type
        self.kept[kind] = message_to_proto(message).SerializeToString()
        return super()._answer(message)

    def again(self, kind: str, ttl: float) -> Message:
        """Send the instruction again, with another time to live."""
        message = message_from_proto(ProtoMessage.FromString(self.kept[kind]))
        message.metadata.ttl = ttl
        return InlineGrid._answer(self, message)


class Clock:
    """A clock on which each step takes a while."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps: list[float] = []

    def step(self, seconds: float) -> None:
        self.now += seconds
        self.steps.append(self.now)

    def restart(self) -> None:
        self.now = 0.0
        self.steps.clear()

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def grid(
    corpus: Path,
    tiny_models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    clock: Clock,
) -> KeepingGrid:
    """A grid after its run, on whose clock a batch takes `grid.seconds`."""
    config: Config = make_config(corpus, tiny_models["bert"], tmp_path / "run")
    config |= {"rounds": 1, "train.epochs": 100, "train.batch-size": 1000}
    config |= {"clients.count": 2, "clients.per-round": 2, "clients.holdout": 0.5}
    grid = KeepingGrid(config)
    start(config, grid)
    entropy = classification.F.cross_entropy

    def step(*arguments: object, **options: object) -> object:
        clock.step(grid.seconds)
        return entropy(*arguments, **options)  # type: ignore[arg-type]

    for module in ("training.loop", "client.guard"):
        monkeypatch.setattr(f"slora_flwr.{module}.time", clock, raising=False)
    monkeypatch.setattr(classification.F, "cross_entropy", step)
    return grid


def test_a_node_stops_training_at_the_rounds_deadline(
    grid: KeepingGrid, clock: Clock
) -> None:
    reply = grid.again(MessageType.TRAIN, ttl=25.0)
    assert clock.steps == [10, 20, 30]
    assert "the round's deadline passed as it trained" in str(reply.error.reason)

    clock.restart()
    assert not grid.again(MessageType.TRAIN, ttl=3000.0).has_error()
    assert len(clock.steps) == 2 * 100


def test_a_node_stops_evaluating_at_the_rounds_deadline(
    grid: KeepingGrid, clock: Clock
) -> None:
    reply = grid.again(MessageType.EVALUATE, ttl=10.0)
    assert clock.steps == [10]
    assert reply.error.reason == "the round's deadline passed as it evaluated"

    clock.restart()
    assert not grid.again(MessageType.EVALUATE, ttl=20.0).has_error()
    assert clock.steps == [10, 20]


@pytest.mark.parametrize("ttl", [float("nan"), float("inf"), 1e18, 0.0, -1.0])
def test_a_time_to_live_that_is_none_is_a_day(
    grid: KeepingGrid, clock: Clock, ttl: float
) -> None:
    grid.seconds = 50_000.0
    assert grid.again(MessageType.TRAIN, ttl).has_error()
    assert clock.steps == [50_000, 100_000]
