"""What the project's files say of it more than once."""

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

from slora_flwr import __version__

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INSTALLATION = (ROOT / "docs" / "install.md").read_text()
DEPENDENCIES: list[str] = PROJECT["dependencies"]


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def test_one_version() -> None:
    assert PROJECT["version"] == __version__
    assert read("CITATION.cff")["version"] == __version__


def test_the_python_versions_that_are_claimed_are_tried() -> None:
    tried = read(".github/workflows/checks.yml")["jobs"]["checks"]["strategy"]
    versions = tried["matrix"]["python"]
    flower = {*tried["matrix"]["flwr"]}
    flower |= {one["flwr"] for one in tried["matrix"]["include"]}
    row = re.findall(r"^\| `flwr\[simulation\]` .*\| (.+) \|$", INSTALLATION, re.M)
    assert row == [", ".join(sorted(flower))]
    claimed = "Programming Language :: Python :: "
    assert [
        name.removeprefix(claimed)
        for name in PROJECT["classifiers"]
        if name.startswith(f"{claimed}3.")
    ] == versions
    after = f"3.{int(versions[-1].split('.')[1]) + 1}"
    assert PROJECT["requires-python"] == f">={versions[0]},<{after}"


def test_the_installation_page_has_the_ranges_of_versions() -> None:
    rows = re.findall(r"^\| `?([\w[\]]+)`? \| `(.+?)` \|", INSTALLATION, re.M)
    claimed = dict(re.findall(r"^(.+?)([<>].*)", text)[0] for text in DEPENDENCIES)
    assert dict(rows) == {"Python": PROJECT["requires-python"]} | {
        name: claimed[name] for name, _ in rows[1:]
    }
    # With another bound, pip would replace the build for CPUs by the one with CUDA.
    at_most = re.findall("<=.*", claimed["torch"])[0]
    assert f'pip install "torch{at_most}" --index-url' in INSTALLATION


def test_the_workflow_makes_the_readmes_checks() -> None:
    readme = (ROOT / "README.md").read_text()
    block = readme.split("<!-- test-command -->")[1].split("```")[1]
    jobs = read(".github/workflows/checks.yml")["jobs"]
    steps = jobs["checks"]["steps"]
    # Those with a name prepare them.
    made = " && ".join(s["run"] for s in steps if "run" in s and "name" not in s)
    for command in made.split(" && "):
        assert command in block
