"""A node of a deployment with data of its own, and what a server asks of it."""

from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from slora_flwr.client.handlers import HANDLERS
from slora_flwr.config import parse
from slora_flwr.training.trainer import Trainer
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.messages import Instruction
from tests.support.runs import Config

MASKED = "st-mary: its data is of no use; its own log says why"


def make_config(model: Path) -> Config:
    return {
        "method": "fft",
        "model.name": str(model),
        "data.name": "node",
        "data.max-length": 12,
        "clients.count": 0,
        "clients.holdout": 0.2,
    }


def a_node(config: Config, **node_config: Any) -> Context:
    """Return the context of a node that is not simulated."""
    named = {key.replace("_", "-"): value for key, value in node_config.items()}
    return Context(5, 7, {"name": "st-mary", **named}, RecordDict(), config)


def ask(
    kind: str, context: Context, content: RecordDict | None = None, ttl: float = 600.0
) -> Message:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 5, 0, 0
    message = Message(content or RecordDict(), 7, kind, ttl=ttl)
    message.metadata.__dict__["_message_id"] = "the message"
    return HANDLERS[kind](message, context)


def first_instruction(config: Config, classes: list[str]) -> Instruction:
    """Return the instruction of client 0 and of a run's first round."""
    trainer = Trainer(parse(config), classes)
    adapter = trainer.model.attach(trainer.schedule[0])
    adapter.begin(1)
    codec = Codec.of_download(trainer.config.download, trainer.model.backbone.head_size)
    state = adapter.state()
    return Instruction(
        1,
        0,
        [0],
        adapter.fingerprint(),
        codec.encode({name: state[name] for name in adapter.sent()}),
        classes=classes,
    )
