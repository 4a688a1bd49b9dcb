"""A node's own data: files that its operator names.

The node's config (`flower-supernode --node-config`) says where they are:

================= =============================================================
``data-path``     a csv, jsonl or parquet file, or a folder of such files
``data-text``     text column, or several, comma-separated; for a language model that
                  of prompts or, without a response, of the texts to learn
``data-label``    label column
``data-labels``   labels that the server may learn, comma-separated; default: all
``data-response`` column of responses, for a language model
``data-messages`` column of conversations, in place of text and response
``min-examples``  fewest examples to train on; default 10
``min-of-label``  fewest examples of a label that the server may learn, and to
                  evaluate on; default 5
``name``          the node's name in the server's output
``partition-id``  id of the node's client; by default the server numbers nodes
================= =============================================================

A run config has no say in any of these. Unusable rows are skipped and counted. An
unreadable file or a missing column is an error.
"""

import csv
import json
import logging
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slora_flwr.common.files import expand
from slora_flwr.common.text import clean_label, counted
from slora_flwr.config import OWN_DATA, ConfigError, DataConfig
from slora_flwr.data.columns import Columns
from slora_flwr.data.dialogues import Dialogue, answered, ask, read_messages, text_of
from slora_flwr.data.presets import Preset
from slora_flwr.data.shared_files import refuse_repeated
from slora_flwr.data.texts import Texts, at_most

BROKEN, NO_TEXT, NO_LABEL = "broken", "no text", "no label"
NO_RESPONSE = "no response"
OTHER_LABEL, RARE_LABEL = "other label", "rare label"
# Yields a file's rows by column, None for a broken row; returns the file's columns.
Rows = Generator[dict[str, Any] | None, None, list[str]]

# A column with more distinct values, or longer ones, holds texts rather than labels.
MOST_LABELS, LONGEST_LABEL = 1000, 200

csv.field_size_limit(2**30)  # whole documents exceed the module's default


class OwnDataError(ConfigError):
    """A node cannot use its data; the message is for the node's operator."""


class TooFewError(OwnDataError):
    """A node has fewer examples than the `least` that it trains on."""

    def __init__(self, text: str, least: int) -> None:
        super().__init__(text)
        self.least = least


@dataclass(frozen=True)
class OwnData:
    """The location of a node's own data.

    Attributes
    ----------
    path, text, label : str
        The file or folder, and its columns; `text` may name several, separated by
        commas. `label` is empty for dialogues.
    labels : tuple[str, ...]
        The labels that may leave the node; empty for all.
    min_examples, min_of_label : int
        The fewest examples to train on; the fewest of a label that may leave the node,
        and to evaluate on.
    response, messages : str
        The columns of the responses and of the conversations; empty for none. Without
        either, the texts of dialogues are learned themselves.
    """

    path: str
    text: str
    label: str
    labels: tuple[str, ...] = ()
    min_examples: int = 10
    min_of_label: int = 5
    response: str = ""
    messages: str = ""

    @classmethod
    def of(
        cls,
        node_config: Mapping[str, Any],
        config: DataConfig,
        train: str = "",
        *,
        dialogues: bool = False,
    ) -> "OwnData":
        """Return the location from a node's config.

        Parameters
        ----------
        node_config : Mapping[str, Any]
            The node's config.
        config : DataConfig
            The columns of a simulated node.
        train : str
            Path of simulated nodes' data, with {} for the node's number; empty for a
            node that is not simulated.
        dialogues : bool
            True for dialogues, False for a classifier's texts.

        Raises
        ------
        OwnDataError
            If a key is missing or its value is not allowed.
        """
        least = _natural(node_config, "min-examples", 10)
        of_label = _natural(node_config, "min-of-label", 5)
        names = str(node_config.get("data-labels", "")).split(",")
        labels = tuple(filter(None, map(clean_label, names)))
        path = str(node_config.get("data-path", ""))
        if not path and train:
            # A simulated node's config has only a partition id.
            path = train.replace("{}", str(node_config.get("partition-id")))
            columns = columns_of(config, dialogues=dialogues)
        elif not path:
            raise OwnDataError(
                f"data.name is {OWN_DATA!r}, and this node's config has no data-path; "
                "allowed: --node-config 'data-path=\"/file/or/folder\"', or, in a "
                "simulation, data.train with {} in place of the node's number"
            )
        else:
            columns = _own_columns(node_config, dialogues=dialogues)
        text, label, response, messages = columns
        return cls(path, text, label, labels, least, of_label, response, messages)

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
            return self._load() if self.label else self._load_dialogues()
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
                values = [row.get(name) for name in (*names, self.label)]
                *parts, label = ["" if v is None else str(v) for v in values]
                if not (
                    all(map(_is_plain, values))
                    and _is_unicode("".join([*parts, label]))
                ):
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

    def _load_dialogues(self) -> tuple[Texts, dict[str, int]]:
        prompts = [] if self.messages else [n.strip() for n in self.text.split(",")]
        names = [*prompts, *filter(None, (self.response, self.messages))]
        dialogues: list[Dialogue] = []
        skipped: Counter[str] = Counter()
        for path in self._files():
            for row in _read(path, names):
                found = self._dialogue(row, names)
                if isinstance(found, str):
                    skipped[found] += 1
                else:
                    dialogues.append(found)
        texts = list(map(text_of, dialogues))
        return Texts(texts, [""] * len(texts), dialogues=dialogues), dict(skipped)

    def _dialogue(
        self, row: Mapping[str, Any] | None, names: Sequence[str]
    ) -> Dialogue | str:
        """Return a row's dialogue, or the reason to skip it."""
        if row is None:
            return BROKEN
        if self.messages:
            try:
                dialogue = read_messages(row.get(self.messages))
            except ValueError:
                return BROKEN
            return dialogue if _is_unicode(text_of(dialogue)) else BROKEN
        values = [row.get(name) for name in names]
        parts = ["" if value is None else str(value) for value in values]
        if not (all(map(_is_plain, values)) and _is_unicode("".join(parts))):
            return BROKEN
        response = parts.pop() if self.response else ""
        if not any(part.strip() for part in parts):
            return NO_TEXT
        if not self.response:
            return answered([], "\n".join(filter(None, parts)))
        return answered(ask(parts), response) if response.strip() else NO_RESPONSE

    def usable(self) -> tuple[Texts, dict[str, int]]:
        """Read the files and leave out the rows whose labels may not leave the node.

        Returns
        -------
        tuple
            As `load`. Rows of labels that `labels` lacks, or that have fewer than
            `min_of_label` rows, are among the skipped ones. Dialogues have no labels.

        Raises
        ------
        OwnDataError
            As `load`; if the column seems to hold something else than labels; and if
            fewer than `min_examples` rows are usable.
        """
        texts, skipped = self.load()
        if self.label:
            texts = self._of_told_labels(texts, skipped)
        self.check_count(len(texts.texts), skipped)
        return texts, skipped

    def of_labels(self, known: Sequence[str]) -> Texts:
        """Return the rows with some public labels, or all dialogues.

        Whether a row is among them does not depend on the other rows: with privacy of
        examples one row more or less must not change which others are trained on.

        Raises
        ------
        OwnDataError
            As `load`; and if fewer than `min_examples` rows are usable.
        """
        texts, _ = self.load()
        if self.label:
            told = {*known} & {*self.labels} if self.labels else {*known}
            texts = texts.select(np.array([x in told for x in texts.labels], bool))
        self.check_count(len(texts.texts))
        return texts

    def _of_told_labels(self, texts: Texts, skipped: dict[str, int]) -> Texts:
        """Return the rows whose labels may leave the node; count the others."""
        self._check_labels(texts)
        if self.labels:
            known = np.array([label in self.labels for label in texts.labels], bool)
            texts = _keep(texts, known, OTHER_LABEL, skipped)
        of_label = Counter(texts.labels)
        common = [of_label[label] >= self.min_of_label for label in texts.labels]
        texts = _keep(texts, np.array(common, bool), RARE_LABEL, skipped)
        if len({*texts.labels}) == 1 and not self.labels:
            raise OwnDataError(
                f"column {self.label!r} has one usable value; allowed: two or more, "
                "or data-labels, which lists what the server may learn"
            )
        return texts

    def check_count(self, count: int, skipped: Mapping[str, int] | None = None) -> None:
        """Raise TooFewError if so few examples should not be trained on."""
        if count < self.min_examples:
            rows = ", ".join(f"{n} {reason}" for reason, n in (skipped or {}).items())
            raise TooFewError(
                f"{counted(count, 'example is', 'examples are')} left to train on, and "
                f"min-examples is {self.min_examples}; skipped: {rows or 'none'}",
                self.min_examples,
            )

    def held_out(self, count: int) -> int:
        """Return how many examples to hold out: `count`, or a few less.

        It is a multiple of `min_of_label`, so that what two shares hold out does not
        differ by single examples.

        Raises
        ------
        OwnDataError
            If metrics would be those of very few examples.
        """
        if 0 < count < self.min_of_label:
            raise OwnDataError(
                f"{counted(count, 'example is', 'examples are')} held out, and "
                f"min-of-label is {self.min_of_label}; allowed: none, or as many"
            )
        return count - count % self.min_of_label

    def _check_labels(self, texts: Texts) -> None:
        """Raise OwnDataError if the column seems to hold texts or names."""
        found = Counter(texts.labels)
        named = [name.strip() for name in self.text.split(",")]
        longest = max(map(len, found), default=0)
        rare = sum(n for n in found.values() if n < self.min_of_label)
        if (
            self.label in named
            or len(found) > MOST_LABELS
            or longest > LONGEST_LABEL
            or rare > len(texts.labels) / 2
        ):
            raise OwnDataError(
                f"column {self.label!r} does not look like labels: it has {len(found)} "
                f"different values of up to {longest} characters, and {rare} rows have "
                f"one of fewer than {self.min_of_label} rows; allowed: a column other "
                f"than the text's, with up to {MOST_LABELS} values of up to "
                f"{LONGEST_LABEL} characters, and at most half of the rows with rare "
                "ones"
            )

    def _files(self) -> list[Path]:
        path = expand(self.path)
        found = [path] if path.is_file() else []
        if path.is_dir():
            # A system's own files begin with a dot, such as those of macOS.
            found = sorted(
                p
                for p in path.iterdir()
                if p.suffix in _READERS and p.is_file() and not p.name.startswith(".")
            )
        if not found or any(p.suffix not in _READERS for p in found):
            raise OwnDataError(
                f"data-path is {self.path!r}; allowed: an existing file that ends in "
                f"{', '.join(_READERS)}, or a folder that holds some"
            )
        return found


def columns_of(config: DataConfig, *, dialogues: bool) -> tuple[str, str, str, str]:
    """Return the columns of text, label, response and messages that a run names."""
    default = Preset("", "text", "label")
    if dialogues:
        default = Preset("", "prompt", response="response")
    found = Columns.of(config, default, "", dialogues=dialogues)
    return ",".join(found.text), found.label, found.response, found.messages


def _own_columns(
    node_config: Mapping[str, Any], *, dialogues: bool
) -> tuple[str, str, str, str]:
    """Return the columns of text, label, response and messages that a node names."""
    keys = ("data-text", "data-label", "data-response", "data-messages")
    text, label, response, messages = (
        str(node_config.get(key, "")).strip() for key in keys
    )
    if dialogues and messages:
        return "", "", "", messages
    if dialogues and label and not response:
        # Its operator means the texts to be told apart, not to be learned by heart.
        raise OwnDataError(
            f"data-label is {label!r}, and the run trains a language model; allowed: "
            "a data-response or data-messages beside it, or none, to have the texts "
            "themselves learned"
        )
    if dialogues and response in [name.strip() for name in text.split(",") if name]:
        raise OwnDataError(
            f"data-response is {response!r}; allowed: a column that data-text lacks, "
            "or prompts would hold the answers"
        )
    needed = {"data-text": text} | ({} if dialogues else {"data-label": label})
    for key, given in needed.items():
        if not given:
            raise OwnDataError(f"{key} is {given!r}; allowed: the name of a column")
    return (text, "", response, "") if dialogues else (text, label, "", "")


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
        _refuse_repeated(path, known)
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
        _refuse_repeated(path, known)
        # Other columns may hold values that Python cannot represent.
        for batch in file.iter_batches(columns=[n for n in known if n in columns]):
            yield from batch.to_pylist()
        return known


_READERS: dict[str, Callable[[Path, list[str]], Rows]] = {
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}


def _refuse_repeated(path: Path, names: list[str]) -> None:
    try:
        refuse_repeated(names)
    except ValueError as error:
        raise OwnDataError(f"data file {path}: {error}") from None


def _natural(node_config: Mapping[str, Any], key: str, default: int) -> int:
    given = node_config.get(key, default)
    if type(given) is not int or given < 1:
        raise OwnDataError(f"{key} is {given!r}; allowed: a whole number above 0")
    return given


def _keep(
    texts: Texts, chosen: NDArray[np.bool_], reason: str, skipped: dict[str, int]
) -> Texts:
    """Return the chosen rows; count the others as skipped."""
    if others := int((~chosen).sum()):
        skipped[reason] = others
    return texts.select(chosen)


def _is_plain(value: Any) -> bool:
    """Return whether a value is text or the like: not nested, no bytes, no NaN."""
    return not isinstance(value, dict | list | tuple | bytes) and value == value


def _is_unicode(text: str) -> bool:
    """Return whether a text has no surrogates, which stand for undecodable bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def load_test_texts(config: DataConfig, *, dialogues: bool = False) -> Texts:
    """Return the texts of the server's own test file; empty if it has none.

    Parameters
    ----------
    config : DataConfig
        The file and its columns.
    dialogues : bool
        True for dialogues, False for a classifier's texts.

    Raises
    ------
    ConfigError
        If the file or a column is missing, or no row is usable.
    """
    if not config.test:
        return Texts([], [])
    text, label, response, messages = columns_of(config, dialogues=dialogues)
    source = OwnData(config.test, text, label, response=response, messages=messages)
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
