"""README and docs say what the code does."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer
from flwr.common.config import parse_config_args

from slora_flwr.cli import app
from slora_flwr.config import parse
from slora_flwr.config.arguments import merge_arguments

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
# Its method is of a package outside; test_third_party.py has it.
ELSEWHERE = ROOT / "docs" / "add-a-method.md"
BLOCK = re.compile(r"```bash\n(.*?)```", re.S)
RUN_CONFIGS = [
    pytest.param(text, id=f"{page.stem}-{number}")
    for page in PAGES
    if page != ELSEWHERE
    for number, text in enumerate(
        re.findall(r'(?:--run-config|-c) "(.+?)"', page.read_text())
    )
]


@pytest.mark.parametrize("run_config", RUN_CONFIGS)
def test_a_run_config_in_the_docs_is_one(run_config: str) -> None:
    parse(parse_config_args([run_config]))


COMMANDS = [
    pytest.param(line, id=f"{page.stem}-{number}")
    for page in PAGES
    if page != ELSEWHERE
    for number, line in enumerate(
        re.findall(r"^slora (\w.*)", "\n".join(BLOCK.findall(page.read_text())), re.M)
    )
]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_in_the_docs_is_one(line: str) -> None:
    name, *given = shlex.split(line.partition(" > ")[0])
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    command = group.commands[name]
    if isinstance(command, click.Group):
        name, *given = given
        command = command.commands[name]
    params = command.make_context(name, given).params
    pairs = params.get("run_config") or []
    parse(merge_arguments(pair for pair in pairs if not pair.endswith(".toml")))


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
