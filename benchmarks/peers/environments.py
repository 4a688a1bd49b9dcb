"""A virtual environment for each peer, with the same PyTorch, transformers and PEFT.

A peer's script metadata (PEP 723) says what is installed, and its table `tool.peers`:

name, package : what it is called; the distribution whose version is told
without-dependencies : requirements that are installed alone, after the others
"""

import json
import re
import subprocess
import tomllib
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

METADATA = re.compile(r"^# /// script\n((?:#.*\n)*?)# ///$", re.MULTILINE)
SHARED = ("torch", "transformers", "peft")


class InstallError(RuntimeError):
    """A peer cannot be installed here."""


def read_metadata(side: Path) -> dict[str, Any] | None:
    """Return a side's script metadata; None if it needs no environment of its own."""
    found = METADATA.search(side.read_text())
    if found is None:
        return None
    lines = found[1].splitlines()
    return tomllib.loads("\n".join(line.removeprefix("#")[1:] for line in lines))


def make_environment(folder: Path, metadata: dict[str, Any]) -> Path:
    """Make an environment, unless it is there as wanted; return its Python.

    Raises
    ------
    InstallError
        If pip cannot install what is wanted.
    """
    python, installed = folder / "bin" / "python", folder / "installed.json"
    shared = [f"{name}=={version(name).split('+')[0]}" for name in SHARED]
    alone = metadata["tool"]["peers"].get("without-dependencies", [])
    wanted = json.dumps([*shared, *metadata["dependencies"], *alone])
    if not installed.exists() or installed.read_text() != wanted:
        venv.create(folder, clear=True, with_pip=True)
        _install(python, *shared, *metadata["dependencies"])
        if alone:
            _install(python, "--no-deps", *alone)
        installed.write_text(wanted)
    return python


def _install(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", *arguments]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        errors = re.findall(r"^ERROR: (.*)$", done.stderr, re.MULTILINE)
        raise InstallError(errors[0] if errors else done.stderr[-200:])
