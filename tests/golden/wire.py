"""What golden runs say of the wire: the layout of messages, the bytes of payloads."""

import random
from collections.abc import Iterator
from hashlib import blake2b
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, Message, MessageType, RecordDict

from slora_flwr.engines import inline
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.messages import BaseDelta, Instruction, Report
from slora_flwr.wire.packing import pack

KINDS = {
    MessageType.QUERY: "query",
    MessageType.TRAIN: "train",
    MessageType.EVALUATE: "evaluate",
}
DTYPES = ("float32", "float16", "bfloat16", "int8", "int4")
HEAD = 24


def note_messages(path: Path) -> None:
    """Have this process note the layout of its inline runs' messages in a file."""
    known: set[str] = set()

    def note(message: Message, direction: str) -> None:
        if message.has_error():
            return
        kind = KINDS[message.metadata.message_type]
        found = {f"{kind} {direction}: {entry}" for entry in _entries(message.content)}
        with path.open("a") as file:  # the process may be killed in the next message
            file.writelines(f"{line}\n" for line in sorted(found - known))
        known.update(found)

    class NotingGrid(inline.InlineGrid):
        def _answer(self, message: Message) -> Message:
            note(message, "down")
            reply = super()._answer(message)
            note(reply, "up")
            return reply

    vars(inline)["InlineGrid"] = NotingGrid


def _entries(content: RecordDict) -> Iterator[str]:
    """Yield a line for each entry of each record: its name, and the type of its value.

    Numbers at the ends of names count things of a kind, so that 0 stands for all.
    """
    for name, record in content.items():
        kind = type(record).__name__
        if not record:
            yield f"{name} {kind}"
        for key, value in record.items():
            stem = key.rstrip("0123456789")
            shown = key if stem == key else f"{stem}0"
            yield f"{name}/{shown} {kind} {_type(value)}"


def _type(value: Any) -> str:
    if isinstance(value, Array):
        return f"{value.stype} {value.dtype} of {len(value.shape)} axes"
    if isinstance(value, list):
        return f"list of {'/'.join(sorted({type(item).__name__ for item in value}))}"
    return type(value).__name__


def list_whole_messages() -> Iterator[str]:
    """Yield the layout of an instruction and a report with every entry that may be."""
    array, digest = pack({}), "0" * 32
    instruction = Instruction(
        server_round=1,
        phase=0,
        clients=[0],
        fingerprint=digest,
        state=array,
        base=digest,
        classes=["x"],
        base_delta=BaseDelta(digest, 1, array, [array], array),
        since=digest,
        lineage=1,
        residuals=[0],
    )
    report = Report(1, 0, digest, array, failures={0: "reason"}, wire=[1, 1])
    report.add(client=0, examples=1, loss=0.5, seconds=0.5, payload=1)
    for name, content in (
        ("whole instruction", instruction.content()),
        ("whole report", report.content()),
    ):
        yield from (f"{name}: {entry}" for entry in _entries(content))


def digest_payloads() -> dict[str, str]:
    """Return a digest of a fixed state's bytes for each way of encoding it.

    Encoding takes no sums, so that the bytes are the same on every machine. Bytes that
    zstd has compressed depend on its version and are left out.
    """
    draw = random.Random(0)
    state = {
        "a": _tensor(draw, 40, 16),
        "b": _tensor(draw, 8, 40),
        "head": _tensor(draw, HEAD),
    }
    found = {}
    for dtype, share, rounding in product(DTYPES, (0.0, 0.1), ("nearest", "drawn")):
        codec = Codec(dtype, share, head=HEAD)
        count = sum(tensor.numel() for tensor in state.values())
        adapter, head = codec.parts(count)
        chosen = np.array(
            [
                *sorted(draw.sample(range(count - HEAD), adapter)),
                *sorted(draw.sample(range(count - HEAD, count), head)),
            ]
        )
        array = codec.encode(
            state,
            chosen if share else None,
            np.random.Philox(7) if rounding == "drawn" else None,
        )
        digest = blake2b(array.data, digest_size=8).hexdigest()
        name = f"{dtype}, share {share}, {rounding}"
        found[name] = f"{array.stype} {array.dtype} {list(array.shape)} {digest}"
    return found


def _tensor(draw: random.Random, *shape: int) -> torch.Tensor:
    # Numbers of 24 bits, which float32 holds exactly.
    values = [draw.getrandbits(24) / 2**23 - 1 for _ in range(int(np.prod(shape)))]
    return torch.tensor(values).reshape(shape)
