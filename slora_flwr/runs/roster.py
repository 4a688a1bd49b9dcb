"""The roster of a study: the names of its runs, in the folder that holds them."""

import json
from collections.abc import Collection
from pathlib import Path

from slora_flwr.common.facts import check
from slora_flwr.common.files import read_regular, write_atomically
from slora_flwr.runs.events import read_json

ROSTER = "study.json"


def write_roster(folder: Path, names: Collection[str]) -> None:
    """Write the names of a study's runs, in place of those of an earlier version."""
    text = json.dumps({"runs": sorted(names)}, indent=2) + "\n"
    write_atomically(folder / ROSTER, text.encode(), mode=0o666)


def read_roster(path: Path) -> frozenset[str] | None:
    """Return the names in a roster's file; None if there is no such file.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is no roster.
    """
    try:
        facts = read_json(read_regular(path))
    except FileNotFoundError:
        return None
    runs = facts.get("runs") if isinstance(facts, dict) else facts
    return check(frozenset[str], runs)
