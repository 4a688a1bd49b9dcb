"""Whatever a node answers is read, or refused by the one error that is meant for it.

`python tests/fuzz.py --minutes 10` feeds the decoders arbitrary and mutated input, with
memory bounded; it ends with 1 if one raised anything else.
`server/test_hostile.py` runs every target for a moment.
"""

import argparse
import os
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from slora_flwr.aggregation.mean import FoldError, Mean
from slora_flwr.aggregation.stack import Stack
from slora_flwr.common.text import printable
from slora_flwr.server.own_data_fleet import Description
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.frame import unwrap, wrap
from slora_flwr.wire.messages import Instruction, MessageError, Report, read_evaluation
from slora_flwr.wire.packing import PayloadError, pack, unpack
from slora_flwr.wire.positions import decode_positions, encode_positions

Draw = Callable[[st.SearchStrategy[Any]], Any]

SHAPES = {"m.lora_A": (4, 60), "m.lora_B": (30, 4), "head": (3,)}
COUNT = 363
CODECS = [
    Codec(dtype, share, lossless, head=3)
    for dtype in ("float32", "float16", "bfloat16", "int8", "int4")
    for share in (0.0, 0.05, 0.4, 1.0)
    for lossless in (False, True)
]
MEGABYTE = 2**20

small = st.integers(-3, 40)
numbers = st.one_of(
    small,
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.sampled_from([2**62, 2**63 - 1, float("inf"), float("nan"), 1.7e308]),
)
texts = st.one_of(st.text(max_size=8), st.sampled_from(["", "9" * 5000, "x" * 10**5]))
# What Flower lets into a record: single values, and lists of one type.
metric = st.one_of(
    numbers,
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6),
    st.lists(small, max_size=6),
    st.lists(st.floats(), max_size=6),
)
entry = st.one_of(
    metric,
    texts,
    st.booleans(),
    st.binary(max_size=8),
    st.lists(texts, max_size=4),
    st.lists(st.booleans(), max_size=4),
    st.lists(st.binary(max_size=4), max_size=4),
)


def mutate(draw: Draw, good: bytes) -> bytes:
    """Change bytes, cut, repeat or insert, some times over."""
    data = bytearray(good)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        way = draw(st.sampled_from(["byte", "word", "cut", "insert", "repeat"]))
        if way == "byte" and data:
            data[at] = draw(st.integers(0, 255))
        elif way == "word":
            word = draw(st.sampled_from([0, 1, 2**15, 2**31 - 1, 2**32 - 1]))
            data[at : at + 4] = word.to_bytes(4, "little")
        elif way == "cut":
            del data[at : at + draw(st.integers(1, 64))]
        elif way == "insert":
            data[at:at] = draw(st.binary(max_size=40))
        elif way == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 300))]
    return bytes(data)


def some_bytes(draw: Draw, good: bytes) -> bytes:
    if draw(st.integers(0, 3)) == 0:
        return bytes(draw(st.binary(max_size=200)))
    return mutate(draw, good)


def some_state(draw: Draw) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([0.0, 1e-30, 1.0, 1e6, 1e30]))
    return {n: scale * torch.randn(s, generator=generator) for n, s in SHAPES.items()}


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


def fuzz_packing(draw: Draw) -> None:
    good = pack(some_state(draw))
    shape = draw(st.one_of(st.just((COUNT,)), st.lists(small, max_size=3).map(tuple)))
    dtype = draw(st.sampled_from(["float32", "int64", "float64", "", "O"]))
    array = Array(dtype, shape, good.stype, some_bytes(draw, good.data))
    try:
        found = unpack(array, SHAPES, draw(st.sampled_from(["float32", "int64"])))
    except PayloadError as error:
        printable(error)
        return
    assert {n: tuple(t.shape) for n, t in found.items()} == SHAPES


def spoilt(draw: Draw, good: dict[str, Any], values: st.SearchStrategy[Any]) -> Any:
    """Leave entries out, change some, and add one."""
    found = dict(good)
    for name in draw(st.lists(st.sampled_from(list(good)), max_size=3, unique=True)):
        del found[name]
        if draw(st.booleans()):
            found[name] = draw(values)
    if draw(st.integers(0, 3)) == 0:
        found[draw(texts)] = draw(values)
    return found


def some_content(
    draw: Draw, metrics: dict[str, Any], config: dict[str, Any], arrays: Sequence[str]
) -> RecordDict:
    records: dict[str, Any] = {
        "metrics": MetricRecord(spoilt(draw, metrics, metric)),
        "config": ConfigRecord(spoilt(draw, config, entry)),
        "arrays": ArrayRecord({name: pack({}) for name in arrays}),
    }
    for name in draw(st.lists(st.sampled_from(list(records)), max_size=1)):
        records[name] = records[draw(st.sampled_from(list(records)))]
    if draw(st.integers(0, 9)) == 0:
        del records[draw(st.sampled_from(list(records)))]
    return RecordDict(records)


def fuzz_report(draw: Draw) -> None:
    lists = ("clients", "examples", "losses", "seconds", "payloads")
    config = {"server-round": 3, "phase": 0, "fingerprint": "f00d"}
    config |= {"failed": [1], "reasons": ["no examples"]}
    good = {"num-examples": 5, **{name: [1, 2] for name in lists}}
    content = some_content(draw, good, config, ["update"])
    try:
        report = Report.read(content)
    except MessageError as error:
        printable(error)
        return
    assert type(report.server_round) is type(report.phase) is int
    assert all(type(getattr(report, name)) is list for name in lists)


def fuzz_instruction(draw: Draw) -> None:
    config = {"server-round": 3, "phase": 0, "phase-round": 1, "clients": [0, 1]}
    config |= {"fingerprint": "f00d", "version": 0, "moves": 1, "base": "b"}
    content = some_content(draw, {"x": 1}, config, ["state", "move-0"])
    try:
        Instruction.read(content)
    except (KeyError, TypeError, ValueError, OverflowError):
        return  # a node answers with it


def fuzz_evaluation(draw: Draw) -> None:
    good: dict[str, Any] = {"num-examples": 6, "loss": 0.5}
    good |= {"hits": [1, 1, 0], "predictions": [3, 2, 1], "labels": [2, 2, 2]}
    content = some_content(draw, good, {"x": 1}, [])
    try:
        found = read_evaluation(content, 3)
    except MessageError as error:
        printable(error)
        return
    if found is not None:
        assert 0 <= found.accuracy <= 1
        assert 0 <= found.macro_f1 <= 1
        assert np.isfinite(found.loss)


def fuzz_description(draw: Draw) -> None:
    config = {"name": "st-mary", "labels": ["a", "b"], "client": 3, "skipped": ["bad"]}
    content = some_content(draw, {"examples": [1, 2], "skipped": [4]}, config, [])
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
            node.add(state, 7, client)
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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--megabytes", type=int, default=256)
    given_ = parser.parse_args()
    for name in TARGETS:  # what is loaded when first used is not the input's doing
        run_target(name, 10, given_.seed)
    bound_memory(given_.megabytes * MEGABYTE)
    until = time.monotonic() + 60 * given_.minutes
    done: Counter[str] = Counter()
    failed: set[str] = set()
    number = given_.seed
    while time.monotonic() < until and failed < TARGETS.keys():
        number += 1
        for name in TARGETS.keys() - failed:
            try:
                done[name] += run_target(name, 300, number)
            except Exception:
                failed.add(name)
                print(f"{name}, seed {number}:\n{traceback.format_exc()}")
    for name, count in sorted(done.items()):
        print(f"{name:12} {count:9,}  {'FAILED' if name in failed else 'ok'}")
    print(f"{sum(done.values()):,} executions, {len(failed)} findings")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
