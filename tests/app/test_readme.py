"""README and docs say what the code does."""

import re
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args

from slora_flwr.config import parse

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = {README, *(ROOT / "docs").rglob("*.md")}
RUN_CONFIGS = [
    pytest.param(text, id=f"{page.stem}-{number}")
    # The method of that page is known once its example is installed.
    for page in sorted(PAGES - {ROOT / "docs" / "add-a-method.md"})
    for number, text in enumerate(
        re.findall(r'(?:--run-config|-c) "(.+?)"', page.read_text())
    )
]


@pytest.mark.parametrize("run_config", RUN_CONFIGS)
def test_a_run_config_in_the_docs_is_one(run_config: str) -> None:
    parse(parse_config_args([run_config]))


def test_every_link_of_the_readme_leads_to_a_file() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README.read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_fault_in_the_docs_has_its_test() -> None:
    tables = (ROOT / "docs" / "reference" / "faults.md").read_text()
    rows = [line for line in tables.splitlines() if line.startswith("| ")]
    assert len(rows) > 40
    for row in rows:
        fault, _, tests = row.strip("| ").split(" | ")
        if fault == "fault":
            continue
        for test in tests.split(", "):
            file, name = test.strip("`").split("::")
            assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), row
