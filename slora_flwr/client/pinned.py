"""What a run's first instruction pins on a node with data of its own."""

from hashlib import blake2b

from flwr.app import ConfigRecord, Context

from slora_flwr.data.node_files import OwnDataError
from slora_flwr.wire.messages import Instruction

_RECORD = "pinned"


def pinned_client(context: Context, instruction: Instruction) -> int:
    """Return the client that a node with data of its own is in this run.

    Client and classes are those of the run's first instruction. Figures of the same
    data by several of either could be told apart down to single examples. Flower keeps
    the node's `Context` until the run ends, whichever process handles a message.

    Raises
    ------
    OwnDataError
        If the instruction names none, several, or others than the first one did.
    """
    if len(instruction.clients) != 1:
        raise OwnDataError(
            f"the instruction names {len(instruction.clients)} clients; allowed: one, "
            "since this node's data is that of one"
        )
    named = "\x1f".join(instruction.classes).encode()
    asked: dict[str, str] = {
        "client": str(instruction.clients[0]),  # it can be beyond 63 bits
        "classes": blake2b(named, digest_size=16).hexdigest(),
    }
    first = context.state.config_records.get(_RECORD)
    if first is None:
        context.state[_RECORD] = ConfigRecord({**asked})
        return instruction.clients[0]
    if others := [key for key, given in asked.items() if first[key] != given]:
        raise OwnDataError(
            f"the instruction's {' and '.join(others)} differ; allowed: those of the "
            "run's first instruction"
        )
    return instruction.clients[0]
