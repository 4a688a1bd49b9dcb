"""The README says what the code does."""

import json
import re
from pathlib import Path

from slora_flwr.config import METHODS, RunConfig, flatten
from slora_flwr.schedule import DEFAULT_RATES, SCHEDULES

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_every_key_is_listed_with_its_default() -> None:
    rows = re.findall(r"^\| `([a-z.-]+)` \| `(.*?)` \|", README, flags=re.M)
    listed = {key: json.loads(value) for key, value in rows}
    assert listed == flatten(RunConfig())


def test_every_method_and_default_rate_is_named() -> None:
    assert set(METHODS) == set(SCHEDULES)
    for method in METHODS:
        assert f"\n| `{method}` |" in README
    for adapter, rate in DEFAULT_RATES.items():
        assert f"{rate:g} for `{adapter}`" in README
