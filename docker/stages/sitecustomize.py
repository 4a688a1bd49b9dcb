"""Has a node of docker/test.sh wait at a stage of a round; on its PYTHONPATH.

The file /stages/now names the stage, such as `before train 2` or `after train 2`: as
the message arrives, or once the reply is made and before it is sent. While it is named,
a node that comes there says so in its log, and waits.
"""

import importlib.util
import sys
import time
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

NOW = Path("/stages/now")
HANDLERS = "slora_flwr.client.handlers"


def wait_at(stage: str) -> None:
    """Wait for as long as a stage is named."""
    if NOW.read_text().strip() == stage:
        print(f"waits {stage}", file=sys.stderr, flush=True)
    while NOW.read_text().strip() == stage:
        time.sleep(0.05)


def waiting(handler: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return a handler that waits before and after it answers."""

    def answer(message: Any, context: Any) -> Any:
        facts = message.metadata
        wait_at(f"before {facts.message_type} {facts.group_id}")
        reply = handler(message, context)
        wait_at(f"after {facts.message_type} {facts.group_id}")
        return reply

    return answer


class Finder(MetaPathFinder):
    """Changes the handlers as they are imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Return the handlers' module, which changes itself; None for all others."""
        if name != HANDLERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_change(module: Any) -> None:
            execute(module)
            for kind, handler in module.HANDLERS.items():
                module.HANDLERS[kind] = waiting(handler)

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder())
