"""The README says what the code does."""

import json
import re
from pathlib import Path

from slora_flwr.config import RunConfig, flatten
from slora_flwr.config.methods import ADAPTERS, find_adapter, list_methods

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_every_key_is_listed_with_its_default() -> None:
    rows = re.findall(r"^\| `([a-z.-]+)` \| `(.*?)` \|", README, flags=re.M)
    listed = {key: json.loads(value) for key, value in rows}
    assert listed == flatten(RunConfig())


def test_every_method_and_default_rate_is_named() -> None:
    for method in list_methods():
        assert f"\n| `{method}` |" in README
    for adapter in ADAPTERS:
        rate = find_adapter(adapter).default_lr
        assert f"{rate:g} for `{adapter}`" in README


def test_every_fault_in_the_docs_has_its_test() -> None:
    tables = (ROOT / "docs" / "faults.md").read_text()
    rows = [line for line in tables.splitlines() if line.startswith("| ")]
    assert len(rows) > 40
    for row in rows:
        fault, _, tests = row.strip("| ").split(" | ")
        if fault == "fault":
            continue
        for test in tests.split(", "):
            file, name = test.strip("`").split("::")
            assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), row
