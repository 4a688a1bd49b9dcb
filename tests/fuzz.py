"""Whatever a node answers is read, or refused by the one error that is meant for it.

`python -m tests.fuzz --minutes 10` feeds the decoders arbitrary and mutated input, with
memory bounded; it ends with 1 if one raised anything else. Whole messages are read as
they come from the network, by Flower's grid.
`server/test_hostile.py` runs every target for a moment.
"""

import argparse
import logging
import os
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from flwr.app import Array, Message, RecordDict
from flwr.app.message import array as array_module
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from slora_flwr.aggregation.mean import FoldError, Mean
from slora_flwr.aggregation.stack import Stack
from slora_flwr.backbone.base_weights import BaseWeights
from slora_flwr.common.text import printable
from slora_flwr.config import DownloadConfig
from slora_flwr.server.collect import pull
from slora_flwr.server.fleet import Fleet
from slora_flwr.server.own_data_fleet import Description, OwnDataFleet
from slora_flwr.server.round import Asked, read_report
from slora_flwr.tasks.classification import Classification, ClassifierEvaluation
from slora_flwr.wire.base_codec import BaseCodec
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.frame import unwrap, wrap
from slora_flwr.wire.integers import decode_integers, encode_integers
from slora_flwr.wire.messages import Instruction, MessageError, Report, read_evaluation
from slora_flwr.wire.packing import PayloadError, pack, unpack
from slora_flwr.wire.positions import decode_positions, encode_positions
from slora_flwr.wire.state_channel import Upload, read_base, write_base
from tests.support.drawn import (
    SHAPES,
    Draw,
    small,
    some_bytes,
    some_content,
    some_state,
)
from tests.support.drawn_messages import ASKED, NODE, LinkedGrid, some_link
from tests.support.objects import Link

COUNT = 363
CODECS = [
    Codec(dtype, share, lossless, head=3)
    for dtype in ("float32", "float16", "bfloat16", "int8", "int4")
    for share in (0.0, 0.05, 0.4, 1.0)
    for lossless in (False, True)
]
MEGABYTE = 2**20


def chosen(draw: Draw, codec: Codec) -> np.ndarray[Any, np.dtype[np.int64]]:
    drawn = np.random.default_rng(draw(st.integers(0, 2**32)))
    body, head = codec.parts(COUNT)
    of_body = drawn.choice(COUNT - 3, body, replace=False)
    of_head = COUNT - 3 + drawn.choice(3, head, replace=False)
    return np.sort(np.concatenate([of_body, of_head])).astype(np.int64)


def some_array(draw: Draw, codec: Codec) -> Array:
    """An array of a coded state, spoilt on one of its levels."""
    state = some_state(draw)
    picked = chosen(draw, codec) if codec.share else None
    good = codec.encode(state, picked)
    level = draw(st.sampled_from(["none", "frame", "contents", "array"]))
    data, shape, dtype, stype = good.data, good.shape, good.dtype, good.stype
    if level == "frame":
        data = some_bytes(draw, data)
    elif level == "contents" and not codec.is_plain:
        # Behind a right checksum, so that the readers within are reached.
        inner = some_bytes(draw, codec.write(state, picked))
        data = wrap(inner, draw(st.sampled_from([1, 2, 4])), compress=codec.lossless)
    elif level == "array":
        shape = tuple(draw(st.lists(st.integers(-1, 2**40), max_size=3)))
        dtype = draw(st.sampled_from([dtype, "int64", "object", "x" * 10**5]))
        stype = draw(st.sampled_from([stype, "numpy.ndarray", "slora.packed"]))
    return Array(dtype, shape, stype, data)


def fuzz_codec(draw: Draw) -> None:
    codec = draw(st.sampled_from(CODECS))
    try:
        state = codec.decode(some_array(draw, codec), SHAPES)
    except PayloadError as error:
        printable(error)
        return
    assert {n: tuple(t.shape) for n, t in state.items()} == SHAPES
    assert all(t.dtype == torch.float32 for t in state.values())


def fuzz_difference(draw: Draw) -> None:
    codec = draw(st.sampled_from([c for c in CODECS if c.lossless and not c.share]))
    known, data = codec.write(some_state(draw)), codec.write(some_state(draw))
    good = codec.seal(data, COUNT, known).data
    frame = some_bytes(draw, good)
    size = draw(st.sampled_from([1, 2, 4]))
    try:
        read = unwrap(frame, size, len(data), draw(st.sampled_from([b"", known])))
    except PayloadError:
        return
    assert len(read) <= len(data)


def fuzz_positions(draw: Draw) -> None:
    size = draw(st.integers(1, 100_000))
    count = draw(st.integers(0, min(size, 200)))
    drawn = np.random.default_rng(draw(st.integers(0, 2**32)))
    good = np.sort(drawn.choice(size, count, replace=False)).astype(np.int64)
    data = some_bytes(draw, encode_positions(good, size))
    try:
        found = decode_positions(data, count, size)
    except PayloadError:
        return
    assert len(found) == count
    assert (np.diff(found) > 0).all()
    assert not count or (found[0] >= 0 and found[-1] < size)


def fuzz_integers(draw: Draw) -> None:
    numbers = st.integers(-(2**63), 2**63 - 1)
    values = draw(st.lists(st.one_of(numbers, small), max_size=300))
    data = some_bytes(draw, encode_integers(np.array(values, dtype=np.int64)))
    try:
        found = decode_integers(data, len(values))
    except PayloadError:
        return
    assert (found.shape, found.dtype) == ((len(values),), np.int64)


def fuzz_base(draw: Draw) -> None:
    shapes = {"m.values": (300,), "m.a": (4, 9), "m.b": (6, 4)}
    dtype, lossless = draw(st.sampled_from(["float32", "int8"])), draw(st.booleans())
    codec = BaseCodec.of(DownloadConfig(dtype=dtype, lossless=lossless))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    state = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    known = {"m.values": torch.randn(300, generator=generator)}
    base = BaseWeights.from_state(state, {"m": np.arange(300)}, 1.0)
    data = some_bytes(draw, write_base(base, codec, known).data)
    try:
        found = read_base(data, shapes, base.positions, 1.0, codec, known)
    except PayloadError as error:
        printable(error)
        return
    assert {n: tuple(t.shape) for n, t in found.state().items()} == shapes


def fuzz_packing(draw: Draw) -> None:
    good = pack(some_state(draw))
    shape = draw(st.one_of(st.just((COUNT,)), st.lists(small, max_size=3).map(tuple)))
    dtype = draw(st.sampled_from(["float32", "int64", "float64", "", "O"]))
    array = Array(dtype, shape, good.stype, some_bytes(draw, good.data))
    try:
        found = unpack(array, SHAPES)
    except PayloadError as error:
        printable(error)
        return
    assert {n: tuple(t.shape) for n, t in found.items()} == SHAPES


def some_report(draw: Draw, arrays: Sequence[str] = ("update",)) -> RecordDict:
    lists = ("clients", "examples", "losses", "seconds", "payloads")
    config = {"server-round": 3, "phase": 0, "fingerprint": "f00d"}
    config |= {"failed": [1], "reasons": ["no examples"]}
    good = {"num-examples": 5, **{name: [1, 2] for name in lists}}
    return some_content(draw, good, config, arrays)


def some_instruction(draw: Draw) -> RecordDict:
    config = {"server-round": 3, "phase": 0, "phase-round": 1, "clients": [0, 1]}
    config |= {"fingerprint": "f00d", "version": 0, "moves": 1, "base": "b" * 32}
    return some_content(draw, {"x": 1}, config, ["state", "move-0"])


def some_evaluation(draw: Draw) -> RecordDict:
    good: dict[str, Any] = {"num-examples": 6, "loss": 0.5}
    good |= {"hits": [1, 1, 0], "predictions": [3, 2, 1], "labels": [2, 2, 2]}
    return some_content(draw, good, {"x": 1}, [])


def some_description(draw: Draw) -> RecordDict:
    config = {"name": "st-mary", "labels": ["a", "b"], "client": 3, "skipped": ["bad"]}
    config |= {"nodes": 2, "version": "1", "protocol": 7}
    metrics = {"examples": [1, 2], "skipped": [4], "clients": [0, 1]}
    return some_content(draw, metrics, config, [])


def fuzz_report(draw: Draw) -> None:
    try:
        report = Report.read(some_report(draw))
    except MessageError as error:
        printable(error)
        return
    assert type(report.server_round) is type(report.phase) is int
    lists = ("clients", "examples", "losses", "seconds", "payloads")
    assert all(type(getattr(report, name)) is list for name in lists)


def fuzz_instruction(draw: Draw) -> None:
    with suppress(MessageError):  # a node answers with it
        Instruction.read(some_instruction(draw))


def check_evaluation(content: RecordDict) -> None:
    try:
        found = read_evaluation(content, Classification(), 3)
    except MessageError as error:
        printable(error)
        return
    if found is not None:
        assert isinstance(found, ClassifierEvaluation)
        assert 0 <= found.accuracy <= 1
        assert 0 <= found.macro_f1 <= 1
        assert np.isfinite(found.loss)


def fuzz_evaluation(draw: Draw) -> None:
    check_evaluation(some_evaluation(draw))


def fuzz_description(draw: Draw) -> None:
    content = some_description(draw)
    try:
        found = Description.read(
            content.config_records["config"], content.metric_records["metrics"]
        )
    except KeyError:
        return  # what `Fleet` looks for first
    except ValueError as error:
        printable(error)
        return
    assert sorted(found.labels)
    assert found.name.isprintable()


def pulled(link: Link, most: int) -> Message | None:
    """Return what is read of a reply, if it is there."""
    pending = {ASKED: NODE}
    found = list(pull(LinkedGrid(link), pending, most))
    if not found:
        assert pending == {ASKED: NODE}
        return None
    [(reply, _)] = found
    assert not pending
    assert reply.metadata.src_node_id == NODE
    if reply.has_error():
        told = str(reply.error.reason)
        printable(told)
        # Memory is bounded: `--megabytes` are not all that there is.
        assert "MemoryError" not in told.split(": ")[:2]
    return reply


def fuzz_pulled_report(draw: Draw) -> None:
    codec = draw(st.sampled_from(CODECS))
    content = some_report(draw)
    if "arrays" in content.array_records:
        content.array_records["arrays"]["update"] = some_array(draw, codec)
    # Several chunks, as large arrays have.
    size = draw(st.sampled_from([100, 500, 10**6]))
    with patch.object(array_module, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", size):
        link = some_link(draw, content)
    reply = pulled(link, codec.most(COUNT))
    if reply is None:
        return
    fold = Mean(None, codec)
    fold.expect(40)
    asked = Asked(3, 0, "f00d", {NODE: {1: 2, 2: 2}}, codec.most(COUNT))
    try:
        report = read_report(reply, asked)
        fold.take(report.update, SHAPES, report.clients, report.examples)
    except (MessageError, PayloadError, FoldError) as error:
        printable(error)


def fuzz_pulled_evaluation(draw: Draw) -> None:
    reply = pulled(some_link(draw, some_evaluation(draw)), 0)
    if reply is not None and not reply.has_error():
        check_evaluation(reply.content)


def fuzz_pulled_description(draw: Draw) -> None:
    expected, sizes = {"protocol": 7}, {0: 1, 1: 2}
    fleet = draw(
        st.sampled_from(
            [
                lambda: Fleet(expected, 1, 5.0, sizes),
                lambda: OwnDataFleet(expected, 1, 5.0, labels=["a", "b"]),
                lambda: OwnDataFleet(expected, 1, 5.0),
            ]
        )
    )()
    fleet.refresh(LinkedGrid(some_link(draw, some_description(draw))))
    assert fleet.left_out.keys() <= {NODE}
    assert all(reason.isprintable() for reason in fleet.left_out.values())
    assert not any("MemoryError" in reason for reason in fleet.left_out.values())


def fuzz_pulled_instruction(draw: Draw) -> None:
    grid = LinkedGrid(some_link(draw, some_instruction(draw)))
    try:
        found = list(grid.pull_messages([ASKED]))
        contents = [message.content for message in found if message.has_content()]
    except Exception:
        return  # in Flower, before a ClientApp is asked
    for content in contents:
        with suppress(MessageError):
            Instruction.read(content)


def fuzz_fold(draw: Draw) -> None:
    codec = draw(st.sampled_from(CODECS))
    kind = draw(st.sampled_from([Mean, Stack]))
    fold = kind(None, codec, draw(st.sampled_from([0.0, 1.0])))
    fold.expect(40)
    clients = draw(st.sampled_from([[3], [3, 4]]))
    if len(clients) == 1:
        array = some_array(draw, codec)
    else:
        node = kind(None, codec)
        for client in clients:
            # A node's sum is refused on the node where it is beyond the range.
            state = {n: t.clamp(-1e3, 1e3) for n, t in some_state(draw).items()}
            picked = chosen(draw, codec) if codec.share else None
            coded = codec.encode(state, picked)
            node.add_upload(Upload(coded, codec.decode(coded, SHAPES)), 7, client)
        array = node.packed()
        array.data = some_bytes(draw, array.data)
    before = dict(fold.sums), fold.weight
    try:
        fold.take(array, SHAPES, clients, [7] * len(clients))
    except (FoldError, PayloadError) as error:
        printable(error)
        assert (fold.sums, fold.weight) == before
        return
    assert all(bool(t.isfinite().all()) for t in fold.result().values())


TARGETS: dict[str, Callable[[Draw], None]] = {
    name.removeprefix("fuzz_"): function
    for name, function in list(globals().items())
    if name.startswith("fuzz_")
}


def run_target(name: str, examples: int, number: int) -> int:
    """Run a target on so many inputs of a seed; give how many there were."""
    done = 0

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        nonlocal done
        done += 1
        with warnings.catch_warnings():
            # NaN times a scale; what comes of it is refused later.
            warnings.simplefilter("ignore", RuntimeWarning)
            TARGETS[name](data.draw)

    run()
    return done


def bound_memory(more: int) -> None:
    """Let this process take so many bytes more, and no more."""
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (taken + more, taken + more))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--only", choices=TARGETS)
    given_ = parser.parse_args()
    targets = {given_.only} if given_.only else set(TARGETS)
    logging.disable()
    for name in targets:  # what is loaded when first used is not the input's doing
        run_target(name, 30, 0)
    bound_memory(given_.megabytes * MEGABYTE)
    until = time.monotonic() + 60 * given_.minutes
    done: Counter[str] = Counter()
    failed: set[str] = set()
    number, before = given_.seed, peak_megabytes()
    while True:
        for name in sorted(targets - failed):
            try:
                done[name] += run_target(name, 100, number)
            except Exception:
                failed.add(name)
                print(f"{traceback.format_exc()}\nAgain with:", flush=True)
                again = f"--only {name} --seed {number} --minutes 0"
                print(f"  python -m tests.fuzz {again}", flush=True)
        if time.monotonic() >= until or failed == targets:
            break
        number += 1
    for name, count in sorted(done.items()):
        print(f"{name:20} {count:9,}  {'FAILED' if name in failed else 'ok'}")
    print(
        f"{sum(done.values()):,} executions of seeds {given_.seed} to {number}, "
        f"{len(failed)} findings, {peak_megabytes() - before:.0f} MB more at the peak"
    )
    return int(bool(failed))


def peak_megabytes() -> float:
    """Return the largest resident size so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
