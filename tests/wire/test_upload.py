"""Updates on their way up, and states on their way down: whole runs, coded."""

import math

import pytest
import torch

from tests.support.grids import Grid
from tests.support.runs import (
    HEAD_VALUES,
    INT8,
    LORA_VALUES,
    LOSSLESS,
    SPARSE_VALUES,
    TOP,
    Config,
    differ,
    elsewhere,
    events,
    final,
    ledger,
    payloads,
    start,
    summary,
)

# Whole runs

CODED: dict[str, Config] = {
    "int8": INT8,
    "int4": {"upload.dtype": "int4"},
    "half": {"upload.dtype": "float16", "download.dtype": "bfloat16"},
    "top-k": TOP,
    "all": INT8 | TOP | LOSSLESS,
    "sparse": INT8 | LOSSLESS | {"method": "sft"},
    "fft": INT8 | TOP | LOSSLESS | {"method": "fft"},
    "lossless": LOSSLESS,
    "exact": INT8 | {"method": "slora", "lora.aggregator": "exact"},
    "flexlora": INT8 | LOSSLESS | {"method": "flexlora"},
    "alternate": INT8 | TOP | {"method": "alternate-lora"},
    "ffa": INT8 | {"method": "slora", "lora.aggregator": "ffa"},
    "ffa-lora": TOP | {"method": "ffa-lora"},
    "redrawn": INT8 | LOSSLESS | {"method": "slora", "sparse.schedule": "per-round"},
    "federa": INT8 | {"lora.start": "federa"},
    "ranks": TOP | {"lora.ranks": "4, 2", "upload.dtype": "int8"},
    "houlsby": INT8 | LOSSLESS | {"method": "houlsby"},
    "holdout": INT8 | LOSSLESS | {"method": "slora", "clients.holdout": 0.3},
}


@pytest.mark.parametrize("name", CODED)
def test_one_node_is_many_nodes(config: Config, name: str) -> None:
    """Bit for bit, and byte for byte of each client's payload."""
    config |= CODED[name] | {"rounds": 4, "sparse.rounds": 2, "clients.per-round": 4}
    found = []
    for nodes in (1, 3, 6):
        config = elsewhere(config)
        directory = start(config, Grid(config, nodes))
        assert events(directory, "failure") == []
        found.append((final(directory), payloads(directory)))
    for state, bytes_ in found[1:]:
        assert not differ(state, found[0][0])
        assert bytes_ == found[0][1]


@pytest.mark.parametrize("name", [n for n, c in CODED.items() if "lossless" not in n])
def test_coded_runs_learn_as_plain_ones_do(config: Config, name: str) -> None:
    """They end near the plain run: in loss, and in state nearer than that one moved."""
    coded = config | CODED[name]
    plain = {k: v for k, v in coded.items() if not k.startswith(("upload", "download"))}
    plain = elsewhere(plain)
    directory = start(coded, Grid(coded))
    grid = Grid(plain)
    reference = start(plain, grid)
    has_top_k = "upload.top-k" in coded
    away = abs(summary(directory)["loss"] - summary(reference)["loss"])
    # A base or a state that is read wrongly is off by tenths. What is not sent yet is
    # not learned yet.
    assert 0 < away < (math.inf if has_top_k else 0.01)
    if coded["method"] == "slora" or "lora.start" in coded:
        return  # their start is coded too, and the base has what it is off
    after, expected = final(directory), final(reference)
    moved = torch.cat([t.reshape(-1) for t in expected.values()]) - grid.sent(1)
    error = torch.cat([(after[n] - t).reshape(-1) for n, t in expected.items()])
    assert error.norm() < (0.9 if has_top_k else 0.4) * moved.norm()


def test_lossless_changes_nothing_but_bytes(config: Config) -> None:
    config |= {"method": "slora", "rounds": 4, "sparse.rounds": 2}
    plain = start(config, Grid(config))
    config = elsewhere(config, **LOSSLESS)
    coded = start(config, Grid(config))
    assert not differ(final(coded), final(plain))
    for there, here in zip(payloads(plain), payloads(coded), strict=True):
        assert there[:4] == here[:4]
        assert here[4] < there[4]


@pytest.mark.parametrize(
    ("dtype", "bits", "block"), [("int8", 8, 4), ("int4", 4, 4), ("bfloat16", 16, 0)]
)
def test_bytes_of_coded_updates(
    config: Config, dtype: str, bits: int, block: int
) -> None:
    """A frame's header, codes, a scale for each 128; planned and counted alike."""
    config |= {"method": "slora", "rounds": 2, "clients.per-round": 4}
    config |= {"upload.dtype": dtype, "download.dtype": "int8"}
    directory = start(config, Grid(config, nodes=3))

    def size(*parts: int, bits: int = 8, block: int = 4) -> int:
        codes = sum(math.ceil(n * bits / 8) for n in parts)
        return 13 + codes + sum(block * math.ceil(n / 128) for n in parts)

    up = {"bits": bits, "block": block}
    base = 2 * 8 + size(SPARSE_VALUES) + size(LORA_VALUES)
    assert payloads(directory) == [
        (1, "sparse", "down", 4, 4 * size(SPARSE_VALUES, HEAD_VALUES)),
        (1, "sparse", "up", 4, 4 * size(SPARSE_VALUES, HEAD_VALUES, **up)),
        (2, "lora", "down", 4, 4 * (size(LORA_VALUES, HEAD_VALUES) + base)),
        (2, "lora", "up", 4, 4 * size(LORA_VALUES, HEAD_VALUES, **up)),
    ]
    for row in ledger(directory):
        assert row["planned_payload_bytes"] == row["payload_bytes"]


def test_top_k_spares_the_sparse_phase(config: Config) -> None:
    config |= TOP | {"method": "slora", "rounds": 2}
    directory = start(config, Grid(config))
    up = {phase: size for _, phase, way, _, size in payloads(directory) if way == "up"}
    assert up["sparse"] == 6 * 4 * (SPARSE_VALUES + HEAD_VALUES)
    # A tenth of each in float32, and at most 4.7 bits for a position, and a table.
    count = math.ceil(LORA_VALUES / 10) + math.ceil(HEAD_VALUES / 10)
    assert 6 * 4 * count < up["lora"] < 6 * ((4 + 4.7 / 8) * count + 100)


def test_message_bytes_are_few_where_each_node_has_one_client(config: Config) -> None:
    """What the ledger counts as payload is what messages carry, and little more."""
    config |= INT8 | TOP | LOSSLESS | {"method": "lora"}
    directory = start(config, Grid(config, nodes=6))
    for row in ledger(directory):
        payload, message = int(row["payload_bytes"]), int(row["message_bytes"])
        assert payload < message < payload + 6 * 600
