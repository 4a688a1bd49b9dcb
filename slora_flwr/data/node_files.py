"""A node's own data: files that its operator names and that never leave the node.

The node's config (`flower-supernode --node-config`) says where they are:

================ ==============================================================
``data-path``    a csv, jsonl or parquet file, or a folder of such files
``data-text``    text column, or several, comma-separated; default `data.text`
``data-label``   label column; default `data.label`
``name``         the node's name in the server's output
``partition-id`` id of the node's client; by default the server numbers nodes
================ ==============================================================

Unusable rows are skipped and counted. An unreadable file or a missing column is an
error.
"""

import csv
import json
import logging
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slora_flwr.common.text import clean_label
from slora_flwr.config import OWN_DATA, ConfigError, DataConfig
from slora_flwr.data.texts import Texts, at_most

BROKEN, NO_TEXT, NO_LABEL = "broken", "no text", "no label"
# Yields a file's rows by column, None for a broken row; returns the file's columns.
Rows = Generator[dict[str, Any] | None, None, list[str]]

# A column with more distinct values, or longer ones, holds texts rather than labels.
MOST_LABELS, LONGEST_LABEL = 1000, 200

csv.field_size_limit(2**30)  # whole documents exceed the module's default


class OwnDataError(ConfigError):
    """A node cannot use its data; the message is for the node's operator."""


@dataclass(frozen=True)
class OwnData:
    """The location of a node's own data.

    `text` may name several columns, separated by commas.
    """

    path: str
    text: str
    label: str

    @classmethod
    def of(cls, node_config: Mapping[str, Any], config: DataConfig) -> "OwnData":
        """Return the location from a node's config, with defaults from the run's.

        Raises
        ------
        OwnDataError
            If neither says where the data is.
        """
        path = str(node_config.get("data-path", ""))
        if not path and config.train and "num-partitions" in node_config:
            # A simulated node's config has only a partition id.
            path = config.train.replace("{}", str(node_config.get("partition-id")))
        if not path:
            raise OwnDataError(
                f"data.name is {OWN_DATA!r}, and this node's config has no data-path; "
                "allowed: --node-config 'data-path=\"/file/or/folder\"', or, in a "
                "simulation, data.train with {} in place of the node's number"
            )
        text = node_config.get("data-text") or config.text or "text"
        label = node_config.get("data-label") or config.label or "label"
        return cls(path, str(text), str(label))

    def load(self) -> tuple[Texts, dict[str, int]]:
        """Read the files.

        Returns
        -------
        tuple
            The usable rows in the files' order, and the number of skipped ones by
            reason.

        Raises
        ------
        OwnDataError
            If there is no file, one cannot be read, or a column is missing.
        """
        try:
            return self._load()
        except OwnDataError:
            raise
        except Exception as error:
            # Any exception, since its message may quote the data.
            raise OwnDataError(f"data of {self} cannot be read: {error!r}") from error

    def _load(self) -> tuple[Texts, dict[str, int]]:
        names = [name.strip() for name in self.text.split(",")]
        texts: list[str] = []
        labels: list[str] = []
        skipped: Counter[str] = Counter()
        for path in self._files():
            for row in _read(path, [*names, self.label]):
                if row is None:
                    skipped[BROKEN] += 1
                    continue
                parts = [_string(row.get(name)) for name in names]
                label = _string(row.get(self.label))
                if not _is_unicode("".join([*parts, label])):
                    skipped[BROKEN] += 1
                    continue
                label = clean_label(label)
                if not any(part.strip() for part in parts):
                    skipped[NO_TEXT] += 1
                elif not label:
                    skipped[NO_LABEL] += 1
                else:
                    texts.append("\n".join(parts))
                    labels.append(label)
        return Texts(texts, labels), dict(skipped)

    def labels(self, texts: Texts) -> dict[str, int]:
        """Return the number of rows with each label, for the server.

        Raises
        ------
        OwnDataError
            If the column seems to hold texts, which must not leave the node.
        """
        found = Counter(texts.labels)
        named = [name.strip() for name in self.text.split(",")]
        longest = max(map(len, found), default=0)
        if self.label in named or len(found) > MOST_LABELS or longest > LONGEST_LABEL:
            raise OwnDataError(
                f"column {self.label!r} does not look like labels: it has {len(found)} "
                f"different values of up to {longest} characters; allowed: a column "
                f"other than the text's, with up to {MOST_LABELS} values of up to "
                f"{LONGEST_LABEL} characters"
            )
        return dict(sorted(found.items()))

    def _files(self) -> list[Path]:
        path = Path(self.path).expanduser()
        found = [path] if path.is_file() else []
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix in _READERS)
        if not found or any(p.suffix not in _READERS for p in found):
            raise OwnDataError(
                f"data-path is {self.path!r}; allowed: an existing file that ends in "
                f"{', '.join(_READERS)}, or a folder that holds some"
            )
        return found


def _read(path: Path, columns: list[str]) -> Rows:
    known = yield from _READERS[path.suffix](path, columns)
    missing = [name for name in columns if name not in known]
    if missing:
        raise OwnDataError(
            f"data file {path} has no column {', '.join(missing)}; its columns are "
            f"{', '.join(known)}"
        )
    return known


def _csv(path: Path, columns: list[str]) -> Rows:
    # Bytes that are not UTF-8 break their row, not the file.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        known = list(reader.fieldnames or [])
        while True:
            try:
                row: dict[str, Any] = next(reader)
            except StopIteration:
                return known
            except csv.Error as error:
                if "end of data" in str(error):
                    raise OwnDataError(
                        f"data file {path}: a quote after line {reader.line_num} is "
                        "never closed"
                    ) from error
                yield None
                continue
            # A key None holds surplus fields; a value None stands for a missing one.
            whole = None not in row and None not in row.values()
            yield row if whole else None


def _jsonl(path: Path, columns: list[str]) -> Rows:
    known: dict[str, None] = {}
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                known |= dict.fromkeys(row)
                yield row
            else:
                yield None
    return list(known)


def _parquet(path: Path, columns: list[str]) -> Rows:
    # Imported here, since it takes long and most nodes do not need it.
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        known = list(file.schema_arrow.names)
        # Other columns may hold values that Python cannot represent.
        for batch in file.iter_batches(columns=[n for n in known if n in columns]):
            yield from batch.to_pylist()
        return known


_READERS: dict[str, Callable[[Path, list[str]], Rows]] = {
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}


def _string(value: Any) -> str:
    return "" if value is None else str(value)


def _is_unicode(text: str) -> bool:
    """Return whether a text has no surrogates, which stand for undecodable bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def load_test_texts(config: DataConfig) -> Texts:
    """Return the texts of the server's own test file; empty if it has none.

    Raises
    ------
    ConfigError
        If the file or a column is missing, or no row is usable.
    """
    if not config.test:
        return Texts([], [])
    source = OwnData(config.test, config.text or "text", config.label or "label")
    try:
        texts, skipped = source.load()
    except OwnDataError as error:
        raise ConfigError(f"data.test is {config.test!r}: {error}") from error
    told = ", ".join(f"{n} {reason}" for reason, n in skipped.items())
    if not texts.texts:
        raise ConfigError(f"data.test is {config.test!r}, without a usable row: {told}")
    if skipped:
        logging.getLogger(__name__).warning("%s: skipped %s", config.test, told)
    return at_most(config.max_test, texts)
