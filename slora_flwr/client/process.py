"""What a node's process keeps between the messages of a run."""

from functools import lru_cache

from flwr.app import Context

from slora_flwr.config import RunConfig, flatten, parse
from slora_flwr.data.node_files import OwnData
from slora_flwr.training.trainer import Trainer
from slora_flwr.wire.messages import Instruction


class ClientProcess:
    """A run's trainer, and the last states that came.

    Parameters
    ----------
    config, classes
        As of `Trainer`.

    Attributes
    ----------
    received : dict[str, bytes]
        The last states, as `Codec.write` returned them, by their digests.
    """

    def __init__(self, config: RunConfig, classes: tuple[str, ...]) -> None:
        self.trainer = Trainer(config, classes)
        self.received: dict[str, bytes] = {}

    def receive(self, digest: str, data: bytes) -> None:
        """Keep a state for the differences to it, and the one that came before.

        Nodes of one process can be told of different ones.
        """
        self.received.pop(digest, None)
        before = list(self.received.items())[-1:]
        self.received = {**dict(before), digest: data}


make_process = lru_cache(maxsize=1)(ClientProcess)


def get_process(
    context: Context, instruction: Instruction | None = None
) -> ClientProcess:
    """Return what this process keeps for the run; simulation keeps processes alive."""
    config = parse(context.run_config)
    if config.clients.count == 0 and not config.data.is_own:
        config = _one_client_per_node(config, context)
    process = make_process(config, tuple(instruction.classes) if instruction else ())
    if instruction and config.data.is_own:
        source = OwnData.of(context.node_config, config.data)
        for client in instruction.clients:
            process.trainer.data.host(client, source)
    return process


def _one_client_per_node(config: RunConfig, context: Context) -> RunConfig:
    if "num-partitions" not in context.node_config:
        raise ValueError(
            "clients.count is 0, one client per node, and this node's config has no "
            "partition-id and num-partitions"
        )
    count = int(context.node_config["num-partitions"])
    per_round = min(config.clients.per_round, count)
    changed = {"clients.count": count, "clients.per-round": per_round}
    return parse(flatten(config) | changed)
