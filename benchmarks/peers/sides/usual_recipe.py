"""The usual Flower recipe, benchmarks/usual_recipe, with all nodes in this process.

Its ServerApp and its ClientApp are called as they are: a node and a message for each
client, the model loaded for each, an array for each tensor. Messages are serialised;
there is no Ray, no SuperLink and no wait. Its AdamW is PyTorch's default one.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto

from slora_flwr.engines.inline import InlineGrid
from work import Work

sys.path.append(str(Path(__file__).parents[2] / "usual_recipe"))


def train(work: Work, ended: Callable[[], None]) -> list[float]:
    """Train all rounds; return the mean loss of each."""
    import usual_client
    import usual_server

    found: list[float] = []

    class Nodes(InlineGrid):
        """A node for each client, each a ClientApp."""

        def send_and_receive(
            self, messages: Iterable[Message], *, timeout: float | None = None
        ) -> Iterable[Message]:
            """Return the replies to a round's messages; evaluations have none."""
            replies = list(self.pull_messages(self.push_messages(messages)))
            if not replies:
                ended()
                return []
            told: list[Any] = [reply.content["metrics"] for reply in replies]
            found.append(fmean(each["loss"] for each in told))
            return replies

        def _answer(self, message: Message) -> Message:
            context = self._contexts[message.metadata.dst_node_id]
            message = message_from_proto(message_to_proto(message))
            reply = usual_client.app(message, context)
            return message_from_proto(message_to_proto(reply))

    with tempfile.TemporaryDirectory(dir=work.folder) as folder:
        recipe = Path(folder) / "recipe.json"
        recipe.write_text(json.dumps(work.config))
        config: dict[str, Any] = {"recipe": str(recipe)}
        context = Context(1, 0, {}, RecordDict(), config)
        usual_server.app(Nodes(config, work.clients), context)
    return found
