"""The roster of a folder of runs: which of them its studies have, as last swept."""

import json
from collections.abc import Collection
from pathlib import Path

from slora_flwr.common.facts import check
from slora_flwr.common.files import read_regular, write_atomically
from slora_flwr.runs.events import read_json

ROSTER = "studies.json"


def write_roster(folder: Path, study: str, names: Collection[str]) -> None:
    """Write the names of a study's runs, in place of those of an earlier version.

    Raises
    ------
    OSError
        If the roster cannot be read or written.
    ValueError
        If what is there is no roster.
    """
    studies = (_read(folder / ROSTER) or {}) | {study: sorted(names)}
    text = json.dumps(studies, indent=2) + "\n"
    write_atomically(folder / ROSTER, text.encode(), mode=0o666)


def read_roster(path: Path) -> frozenset[str] | None:
    """Return the names of all studies' runs; None if there is no such file.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is no roster.
    """
    studies = _read(path)
    return None if studies is None else frozenset().union(*studies.values())


def _read(path: Path) -> dict[str, list[str]] | None:
    try:
        data = read_regular(path)
    except FileNotFoundError:
        return None
    return check(dict[str, list[str]], read_json(data))
