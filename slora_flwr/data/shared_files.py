"""Shared data files: csv, json, jsonl and parquet, read whole or refused.

Every node must read the same rows, so no row is skipped. Values stay as they are
written: 007 is not 7. `datasets` would guess types, and keep a copy of the texts.
"""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slora_flwr.common.text import printable
from slora_flwr.config import ConfigError

csv.field_size_limit(2**30)  # whole documents exceed the module's default

# Folders in which all files must be that are read; None where any file will do.
_ROOTS: ContextVar[Sequence[Path] | None] = ContextVar("roots", default=None)


@dataclass(frozen=True)
class Table:
    """The names of all columns, and the values of those that are wanted."""

    names: list[str]
    columns: dict[str, list[Any]]


@contextmanager
def only_within(roots: Sequence[Path]) -> Iterator[None]:
    """Let `read_file` open nothing outside some folders, wherever links lead."""
    before = _ROOTS.set(roots)
    try:
        yield
    finally:
        _ROOTS.reset(before)


def read_file(path: Path, wanted: Sequence[str]) -> Table:
    """Return the table in a file, with those of the wanted columns that it has.

    Raises
    ------
    ConfigError
        If there is no such file, it may not be read here, or some of it cannot be.
    """
    if path.suffix not in FORMATS:
        raise ConfigError(f"data file is {path}; allowed: {', '.join(FORMATS)}")
    opened = _resolve(path)
    if not opened.is_file():
        raise ConfigError(
            f"data file {path} does not exist; allowed: one that is there (for `flwr "
            "run` by its absolute path, since it does not start in your folder), or "
            "one inside the folder that data.name names"
        )
    try:
        return FORMATS[path.suffix](opened, wanted)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"data file {path} is not UTF-8 ({error.reason}); allowed: UTF-8"
        ) from None  # a traceback would quote the file
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"data file {path} cannot be read ({printable(error)}); allowed: a whole "
            f"{path.suffix.removeprefix('.')} file"
        ) from None


def _resolve(path: Path) -> Path:
    """Return the path to open, without links where they may lead out of the roots."""
    roots = _ROOTS.get()
    if roots is None:
        return path
    found = path.resolve()
    if not any(found.is_relative_to(root) for root in roots):
        raise ConfigError(
            f"data file {path} is {found}; allowed on this node: files in a folder of "
            f"allowed-folders, now {[*map(str, roots)]}"
        )
    return found


def _csv(path: Path, wanted: Sequence[str]) -> Table:
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = _lines(csv.reader(file, strict=True))
        _, names = next(lines, (0, []))
        if "\0" in "".join(names):
            raise ValueError("it has zero bytes, as UTF-16 has")
        refuse_repeated(names)
        kept = [i for i, name in enumerate(names) if name in wanted]
        rows = []
        for number, row in lines:
            if len(row) != len(names):
                raise ValueError(
                    f"the row at line {number} has {len(row)} fields, the header "
                    f"{len(names)}"
                )
            rows.append([row[i] or None for i in kept])
    if not rows:
        raise ValueError("it has no rows below a header")
    columns = zip(*rows, strict=True)
    return Table(names, {names[i]: list(c) for i, c in zip(kept, columns, strict=True)})


def _lines(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield each row that is not blank, with the number of its first line."""
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"a quote in the row at line {number} is never closed"
                if "end of data" in str(error)
                else f"the row at line {number}: {error}"
            ) from error
        if row:
            yield number, row


def refuse_repeated(names: list[str]) -> None:
    """Raise ValueError if several columns have one name."""
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"several columns are named {', '.join(repeated)}")


def _json(path: Path, wanted: Sequence[str]) -> Table:
    """Read a list of objects, or one object a line."""
    text = path.read_text(encoding="utf-8-sig")
    whole = text.lstrip()[:1] == "["
    rows = json.loads(text) if whole else list(_read_lines(text))
    if not rows:
        raise ValueError("it has no rows")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is not an object")
    names = list({name: None for row in rows for name in row})
    return Table(names, {n: [row.get(n) for row in rows] for n in names if n in wanted})


def _read_lines(text: str) -> Iterator[Any]:
    # By hand, since `splitlines` also splits at characters that strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} is not JSON") from error


def _parquet(path: Path, wanted: Sequence[str]) -> Table:
    # Imported here, since it takes long and csv files do not need it.
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        schema, names = file.schema_arrow, list(file.schema_arrow.names)
        refuse_repeated(names)
        if not file.metadata.num_rows:
            raise ValueError("it has no rows")
        rows = file.read([name for name in names if name in wanted])
    columns = {name: rows[name].to_pylist() for name in rows.column_names}
    for name, known in _class_names(schema).items():
        if name in columns:
            numbers = columns[name]
            columns[name] = [None if i in (None, -1) else known[i] for i in numbers]
    return Table(names, columns)


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Return the names of numbered labels, which `datasets` writes into a file."""
    told = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(told)["info"]["features"] if told else {}
    return {
        name: feature["names"]
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }


FORMATS: dict[str, Callable[[Path, Sequence[str]], Table]] = {
    ".csv": _csv,
    ".json": _json,
    ".jsonl": _json,
    ".parquet": _parquet,
}
