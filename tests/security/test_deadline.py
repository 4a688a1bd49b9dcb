"""A node works for a round no longer than the server waits for it."""

from pathlib import Path

import pytest
from flwr.app import Message, MessageType
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

from slora_flwr.engines.inline import InlineGrid
from slora_flwr.training import loop
from tests.support.grids import Grid
from tests.support.runs import Config, make_config, start


class KeepingGrid(Grid):
    """Keeps the last instruction to train."""

    kept: bytes

    def _answer(self, message: Message) -> Message:
        if message.metadata.message_type == MessageType.TRAIN:
            self.kept = message_to_proto(message).SerializeToString()
        return super()._answer(message)

    def train(self, ttl: float) -> Message:
        """Send the instruction again, with another time to live."""
        message = message_from_proto(ProtoMessage.FromString(self.kept))
        message.metadata.ttl = ttl
        return InlineGrid._answer(self, message)


class Clock:
    """A clock on which each step of training takes ten seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now


def test_a_node_stops_training_at_the_rounds_deadline(
    corpus: Path,
    tiny_models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config: Config = make_config(corpus, tiny_models["bert"], tmp_path / "run")
    config |= {"rounds": 1, "train.epochs": 100, "train.batch-size": 1000}
    config |= {"clients.count": 2, "clients.per-round": 1}
    grid = KeepingGrid(config)
    start(config, grid)

    clock, steps = Clock(), []
    entropy = loop.F.cross_entropy

    def step(*arguments: object, **options: object) -> object:
        clock.now += 10
        steps.append(clock.now)
        return entropy(*arguments, **options)  # type: ignore[arg-type]

    for module in ("training.loop", "client.handlers"):
        monkeypatch.setattr(f"slora_flwr.{module}.time", clock, raising=False)
    monkeypatch.setattr(loop.F, "cross_entropy", step)
    reply = grid.train(ttl=25.0)
    assert steps == [10, 20, 30]
    assert "the round's deadline passed as it trained" in str(reply.error.reason)

    steps.clear()
    assert not grid.train(ttl=2000.0).has_error()
    assert len(steps) == 100
