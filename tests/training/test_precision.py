"""Which precision `auto` is, and that it is told."""

from collections.abc import Iterator

import pytest
import torch

from slora_flwr.training import precision
from slora_flwr.training.precision import multiplies_bf16, resolve_precision

CPU = torch.device("cpu")
HAS = {
    "bare": ({}, False),
    "avx512": ({"avx512_f": True, "avx512_bf16": False}, False),
    "zen4": ({"avx512_bf16": True}, True),
    "amx": ({"avx512_bf16": False, "amx_bf16": True}, True),
}


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    multiplies_bf16.cache_clear()
    yield
    multiplies_bf16.cache_clear()


@pytest.mark.parametrize("name", HAS)
def test_auto_is_what_the_processor_has(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has, is_native = HAS[name]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert multiplies_bf16("cpu") is is_native
    assert resolve_precision("auto", CPU) == ("bf16" if is_native else "float32")
    assert resolve_precision("bf16", CPU) == "bf16"
    assert resolve_precision("float32", CPU) == "float32"


@pytest.mark.parametrize(
    ("limit", "is_native"),
    [("AVX512_CORE_VNNI", False), ("avx2", False), ("AVX512_CORE_BF16", True)],
)
def test_onednns_limit_is_heeded(
    limit: str, is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert multiplies_bf16("cpu") is is_native


def test_other_devices_stay_with_float32() -> None:
    assert not precision.multiplies_bf16("mps")
