"""On the PYTHONPATH of a deployment's processes, which err when they are told.

The file that SLORA_TEST_FAULTS names says in which round a node does what, and what it
does when it is to describe itself ("query"); to the one
that SLORA_TEST_DONE names, it adds a line for each wait in a round and each reply.
While the file is there that SLORA_TEST_LATE names, a server's deadlines are over.
"""

import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


def spoil_training(module: ModuleType) -> None:
    """Change how `slora_flwr.client.handlers` trains."""
    train, given = module.HANDLERS["train"], {}

    def answer(message: Any, context: Any) -> Any:
        number = int(message.metadata.group_id)
        if fault_of(number) == "waits":
            write_down(message.metadata.run_id, "waits", number)
        while (fault := fault_of(number)) == "waits":
            time.sleep(0.05)
        if fault == "raises":
            raise RuntimeError("this client fails")
        if fault == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        reply = train(message, context)
        given[number] = reply.content
        if fault in ("stale", "other-phase"):
            reply.content = given[number - 1]
        if fault == "other-phase":
            reply.content.config_records["config"]["server-round"] = number
        return reply

    module.HANDLERS["train"] = answer


def spoil_description(module: ModuleType) -> None:
    """Change how `slora_flwr.client.handlers` describes a node's own data."""
    query = module.HANDLERS["query"]

    def answer(message: Any, context: Any) -> Any:
        reply = query(message, context)
        labels = LABELS.get(fault_of("query"))
        if labels is not None:
            reply.content.config_records["config"]["labels"] = labels
            counts = [2] * len(labels)
            reply.content.metric_records["metrics"]["examples"] = counts
        return reply

    module.HANDLERS["query"] = answer


def forge_replies(module: ModuleType) -> None:
    """Change how a SuperNode replies: with other objects."""
    forged = importlib.import_module("forged").FORGED
    protos = importlib.import_module("flwr.proto.message_pb2")
    read = importlib.import_module("flwr.common.serde").message_from_proto
    client = module.FleetHttpClient
    push = client.PushMessages

    def push_forged(self: Any, request: Any) -> Any:
        facts = request.messages_list[0].metadata
        forge = forged.get(fault_of(facts.group_id))
        if forge is None or facts.message_type != "train":
            return push(self, request)
        root, objects = forge(read(request.messages_list[0]))
        facts.message_id = root
        tree = protos.ObjectTree(object_id=root)
        rest = [protos.ObjectTree(object_id=name) for name in objects if name != root]
        tree.children.extend(rest)
        request.message_object_trees[0].CopyFrom(tree)
        response = push(self, request)
        for name in response.objects_to_push:
            self.PushObject(
                protos.PushObjectRequest(
                    node=request.node,
                    run_id=facts.run_id,
                    object_id=name,
                    object_content=objects[name],
                    session_id=response.session_id,
                )
            )
        del response.objects_to_push[:]
        return response

    client.PushMessages = push_forged


def answer_twice(module: ModuleType) -> None:
    """Change how a SuperNode replies: a second time, under another id."""
    client = module.FleetHttpClient
    push, pull = client.PushMessages, client.PullMessages
    sent: list[tuple[int | str, ...]] = []

    def push_twice(self: Any, request: Any) -> Any:
        response = push(self, request)
        facts = request.messages_list[0].metadata
        sent.append((facts.run_id, "sends", facts.message_type, facts.group_id))
        if fault_of(facts.group_id) == "twice":
            other = type(request).FromString(request.SerializeToString())
            other.messages_list[0].metadata.message_id = "f" * 64
            push(self, other)
            sent.append(sent[-1])
        return response

    def pull_next(self: Any, request: Any) -> Any:
        # The reply's objects, which followed it, are there too.
        while sent:
            write_down(*sent.pop(0))
        return pull(self, request)

    client.PushMessages, client.PullMessages = push_twice, pull_next


def pass_deadlines(module: ModuleType) -> None:
    """Change the clock by which `slora_flwr.server.collect` waits."""
    clock = module.time

    def monotonic() -> float:
        ahead = Path(os.environ["SLORA_TEST_LATE"]).exists()
        return float(clock.monotonic() + (1e6 if ahead else 0.0))

    vars(module)["time"] = SimpleNamespace(monotonic=monotonic, sleep=clock.sleep)


def write_down(*what: int | str) -> None:
    with Path(os.environ["SLORA_TEST_DONE"]).open("a") as file:
        file.write(" ".join(map(str, what)) + "\n")


def fault_of(server_round: int | str) -> str:
    faults = json.loads(Path(os.environ["SLORA_TEST_FAULTS"]).read_text())
    return str(faults.get(str(server_round), ""))


# What a description may say of labels.
LABELS = {
    "hidden-label": ["apples", "bridges\x1b[2J\u202e"],
    "many-labels": [f"invented {i}" for i in range(1000)],
}
CHANGES: dict[str, tuple[Callable[[ModuleType], None], ...]] = {
    "slora_flwr.client.handlers": (spoil_training, spoil_description),
    "flwr.supernode.fleet_http_client": (forge_replies, answer_twice),
    "slora_flwr.server.collect": (pass_deadlines,),
}


class Finder(MetaPathFinder):
    """Changes modules as they are imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name not in CHANGES:
            return None
        changes = CHANGES.pop(name)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            for change in changes:
                change(module)

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder())
