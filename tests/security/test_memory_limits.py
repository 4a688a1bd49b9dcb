"""Memory limits of the containers."""

from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "docker"
FILES = ("compose.yml", "compose.client.yml", "compose.server.yml")


def services(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((FOLDER / name).read_text())["services"])


@pytest.mark.parametrize("name", FILES)
def test_every_container_has_a_limit_that_may_be_set(name: str) -> None:
    examples = [path.read_text() for path in FOLDER.glob("*.env.example")]
    for service in services(name).values():
        if "extends" in service:
            origin = service["extends"]
            service = services(origin["file"])[origin["service"]]
        variable, _, default = service["mem_limit"].strip("${}").partition(":-")
        assert all(f"\n{variable}={default}\n" in example for example in examples)
