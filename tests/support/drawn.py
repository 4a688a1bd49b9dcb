"""Drawn input for decoders: bytes, states and records, right ones and spoilt ones."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import strategies as st

from slora_flwr.wire.packing import pack

Draw = Callable[[st.SearchStrategy[Any]], Any]

SHAPES = {"m.lora_A": (4, 60), "m.lora_B": (30, 4), "head": (3,)}

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
