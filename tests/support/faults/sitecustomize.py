"""On a node's PYTHONPATH, in each of its processes: it errs when it is told.

The file that SLORA_TEST_FAULTS names says in which round it does what.
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
from types import ModuleType
from typing import Any


def spoil_training(module: ModuleType) -> None:
    """Change how `slora_flwr.client.handlers` trains."""
    train, given = module.HANDLERS["train"], {}

    def answer(message: Any, context: Any) -> Any:
        number = int(message.metadata.group_id)
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


def answer_twice(module: ModuleType) -> None:
    """Change how a SuperNode replies: a second time, under another id."""
    client = module.FleetHttpClient
    push = client.PushMessages

    def push_twice(self: Any, request: Any) -> Any:
        response = push(self, request)
        if fault_of(request.messages_list[0].metadata.group_id) == "twice":
            other = type(request).FromString(request.SerializeToString())
            other.messages_list[0].metadata.message_id = "f" * 64
            push(self, other)
        return response

    client.PushMessages = push_twice


def fault_of(server_round: int | str) -> str:
    faults = json.loads(Path(os.environ["SLORA_TEST_FAULTS"]).read_text())
    return str(faults.get(str(server_round), ""))


CHANGES: dict[str, Callable[[ModuleType], None]] = {
    "slora_flwr.client.handlers": spoil_training,
    "flwr.supernode.fleet_http_client": answer_twice,
}


class Finder(MetaPathFinder):
    """Changes modules as they are imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name not in CHANGES:
            return None
        change = CHANGES.pop(name)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder())
