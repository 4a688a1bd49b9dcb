"""Text classification data: train and test texts, and the tokenised task."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from slora_flwr.common.files import (
    below_assets,
    cache_folder,
    expand,
    home,
    make_folder,
    write_atomically,
)
from slora_flwr.common.text import (
    is_unicode,
    lookalikes,
    printable,
    redact,
    redact_hub_logs,
    shorten,
)
from slora_flwr.config import ConfigError, DataConfig, refuse
from slora_flwr.data.dialogues import (
    Dialogue,
    answered,
    ask,
    read_messages,
    text_of,
)
from slora_flwr.data.examples import Examples
from slora_flwr.data.presets import DIALOGUES, PRESETS, Preset
from slora_flwr.data.shared_files import FORMATS, Table, read_file

# Share set aside for testing in a data set without a test split.
TEST_SHARE = 0.2
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Texts:
    """Raw texts, each with what is to be learned of it.

    Attributes
    ----------
    texts : list[str]
        The texts; of dialogues, all that is said.
    labels : list[str]
        The names of their labels; of dialogues, of their groups.
    groups : list[str]
        The values by which they are dealt to clients; empty for the labels.
    dialogues : list[Dialogue]
        The texts as dialogues; empty for a classifier's.
    """

    texts: list[str]
    labels: list[str]
    groups: list[str] = field(default_factory=list)
    dialogues: list[Dialogue] = field(default_factory=list)

    def select(self, chosen: NDArray[np.bool_]) -> "Texts":
        """Return the rows where `chosen` is true."""
        rows = np.flatnonzero(chosen)
        groups = [self.groups[r] for r in rows] if self.groups else []
        dialogues = [self.dialogues[r] for r in rows] if self.dialogues else []
        return Texts(
            [self.texts[r] for r in rows],
            [self.labels[r] for r in rows],
            groups,
            dialogues,
        )


def load_texts(
    config: DataConfig, by: str = "", *, dialogues: bool = False
) -> tuple[Texts, Texts]:
    """Load train and test texts, the same on the server and on every node.

    Parameters
    ----------
    config : DataConfig
        The data. If `validation` is above 0, that share of the training data replaces
        the test data, and clients never see it.
    by : str
        The column of the groups; empty for none.
    dialogues : bool
        True for dialogues, False for a classifier's texts.

    Raises
    ------
    ConfigError
        If the data or a column cannot be found.
    """
    train, test = _load(config, by, dialogues)
    if not dialogues:
        _check_classes(config, list_classes((train, test)))
    if config.validation:
        train, test = _split(train, config.validation, "validation")
    for given, key in ((train, "data.train"), (test, "data.test")):
        if not given.texts:
            raise ConfigError(
                f"{key}: data {config.name!r} leaves no examples to "
                f"{'train on' if given is train else 'evaluate on'}; allowed: data "
                "with at least one, after the split by data.validation or by a hash"
            )
    return train, at_most(config.max_test, test)


def prompts_of(texts: Sequence[str]) -> Texts:
    """Return dialogues that begin and end with a prompt each."""
    none = [""] * len(texts)
    return Texts([*texts], none, dialogues=[ask([text]) for text in texts])


def read_unlabelled(
    config: DataConfig, path: Path, *, dialogues: bool = False
) -> Texts:
    """Return the texts in a file: its lines, or the columns that the data has them in.

    Parameters
    ----------
    config : DataConfig
        The columns.
    path : Path
        The file.
    dialogues : bool
        Whether they are prompts, or conversations in which a response is due.

    Raises
    ------
    ConfigError
        If the file cannot be read, or lacks a column.
    """
    if path.suffix == ".txt":
        try:
            # `splitlines` also splits at characters that texts may hold.
            with path.open(encoding="utf-8-sig") as file:
                lines = [line.removesuffix("\n") for line in file]
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read ({error})") from error
        return prompts_of(lines) if dialogues else Texts(lines, [""] * len(lines))
    if path.suffix not in FORMATS:
        raise ConfigError(f"data file is {path}; allowed: .txt, {', '.join(FORMATS)}")
    if not path.exists():
        raise ConfigError(f"{path} cannot be read (No such file or directory)")
    columns = Columns.of(config, _preset(config, dialogues), "", dialogues=dialogues)
    columns = replace(columns, label="", response="")
    table = read_file(path, columns.names)
    return columns.read_unlabelled(table, path.name)


def at_most(count: int, texts: Texts) -> Texts:
    """Return `count` texts chosen by a hash; all if `count` is 0."""
    if not 0 < count < len(texts.texts):
        return texts
    order = np.argsort([_hash("max-test", text) for text in texts.texts])
    chosen = np.zeros(len(texts.texts), dtype=bool)
    chosen[order[:count]] = True
    return texts.select(chosen)


def list_classes(texts: tuple[Texts, Texts]) -> list[str]:
    """Return the sorted label names."""
    return sorted({*texts[0].labels, *texts[1].labels})


def public_classes(config: DataConfig, test: Texts) -> list[str]:
    """Return the sorted label names without a look at the clients' data.

    They are those of `data.labels` or, without it, those of the server's test data.

    Raises
    ------
    ConfigError
        If they are fewer than two, or the test data has others.
    """
    found = {*test.labels}
    classes = config.label_names or sorted(found)
    if len(classes) < 2:
        raise ConfigError(
            f"data.labels is {config.labels!r}; allowed: two names or more, since "
            f"privacy is on and the test data has {len(classes)}"
        )
    if others := sorted(found - {*classes}):
        raise ConfigError(
            f"data.labels is {config.labels!r}; allowed: with all of the test data's, "
            f"such as {printable(others[0])}"
        )
    return classes


def count_common(texts: Texts, others: Texts) -> int:
    """Return how many texts are also among others."""
    found = {*others.texts}
    return sum(text in found for text in texts.texts)


def of_classes(texts: Texts, classes: Sequence[str]) -> Texts:
    """Return the texts with one of some labels."""
    known = {*classes}
    return texts.select(np.array([name in known for name in texts.labels], dtype=bool))


class Encoder(Protocol):
    """Makes tokens of texts."""

    @property
    def pad(self) -> int:
        """The padding token."""

    @property
    def description(self) -> str:
        """All that the tokens depend on besides the texts."""

    def encode(self, texts: Texts) -> dict[str, NDArray[Any]]:
        """Return `tokens` and `offsets` of `Examples`, and `learned` if it has any."""


def tokenise(
    encoder: Encoder,
    classes: Sequence[str],
    texts: Texts,
    folder: Path | None = None,
) -> Examples:
    """Tokenise once per folder; later processes read the arrays from their file.

    Without a folder, it is the cache, which all runs on this machine share.
    """
    # Imported here, since a node that fails early needs neither.
    from safetensors.numpy import load_file, save

    digest = hashlib.blake2b(digest_size=16)
    digest.update(encoder.description.encode())
    for text in map(json.dumps, texts.dialogues) if texts.dialogues else texts.texts:
        digest.update(f"\x1e{text}".encode())
    with _writing_cache():
        folder = folder or cache_folder()
        make_folder(folder)
        path = folder / f"tokens-{digest.hexdigest()}.safetensors"
    if not path.is_file():
        arrays = encoder.encode(texts)
        with _writing_cache():
            write_atomically(path, save(arrays))
    labels = np.zeros(len(texts.texts), dtype=np.int64)
    if not texts.dialogues:
        labels[:] = number(texts.labels, classes)
    return Examples(**load_file(path), labels=labels, pad=encoder.pad)


def in_one_array(encoded: Iterable[Sequence[int]]) -> dict[str, NDArray[Any]]:
    """Return texts' tokens one after another, and where each text begins and ends."""
    rows = list(encoded)
    return {
        "tokens": np.array(list(chain.from_iterable(rows)), dtype=np.int32),
        "offsets": np.cumsum([0, *map(len, rows)], dtype=np.int64),
    }


def number(names: Sequence[str], known: Sequence[str]) -> NDArray[np.int64]:
    """Return the place of each name among those that are known."""
    places = {name: i for i, name in enumerate(known)}
    return np.array([places[name] for name in names], dtype=np.int64)


@contextmanager
def _writing_cache() -> Iterator[None]:
    """Name `$SLORA_HOME` in errors about writing to the cache."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"$SLORA_HOME is {str(home())!r}; allowed: a folder that can be made and "
            f"written, with room for the data's tokens ({error})"
        ) from error


def _split(texts: Texts, share: float, purpose: str) -> tuple[Texts, Texts]:
    """Split off a share by a hash of each text, the same texts every time."""
    drawn = np.array([_hash(purpose, t) for t in texts.texts], dtype=np.float64)
    aside = drawn < share * 2.0**64
    return texts.select(~aside), texts.select(aside)


def _hash(purpose: str, text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=purpose.encode())
    return int.from_bytes(digest.digest())


def _load(config: DataConfig, by: str, dialogues: bool) -> tuple[Texts, Texts]:
    preset = _preset(config, dialogues)
    columns = Columns.of(config, preset, by or preset.by, dialogues=dialogues)
    if not preset.hub:
        whole = columns.read(_read_embedded(config.name), config.name)
        return _split(whole, TEST_SHARE, "test")
    load = _find(config, preset)
    train_split, test_split = config.train or "train", config.test or preset.test

    def read(split: str) -> Texts:
        return columns.read(load(split, columns.names), split)

    train = read(train_split)
    if test_split:
        return train, read(test_split)
    return _split(train, TEST_SHARE, "test")


def _read_embedded(name: str) -> Table:
    """Return a data set that comes with the running Python."""
    if name == "stdlib-docs":
        from slora_flwr.data import stdlib_docs

        texts, chapters = stdlib_docs.load()
        return Table(["text", "chapter"], {"text": texts, "chapter": chapters})
    from slora_flwr.data import stdlib_summaries

    names = [*stdlib_summaries.Summary._fields]
    rows = zip(*stdlib_summaries.load(), strict=True)
    return Table(names, dict(zip(names, map(list, rows), strict=True)))


def _preset(config: DataConfig, dialogues: bool = False) -> Preset:
    if dialogues:
        unknown = Preset(config.name, "prompt", response="response")
        return DIALOGUES.get(config.name, unknown)
    return PRESETS.get(config.name, Preset(config.name, "text", "label"))


def _find(config: DataConfig, preset: Preset) -> Callable[[str, Sequence[str]], Table]:
    """Return the function that loads a split: from files, a folder or the Hub."""
    name = expand(config.name)
    folder = name if name.is_dir() else below_assets("data", config.name)

    def load(split: str, wanted: Sequence[str]) -> Table:
        path = expand(split)
        if path.suffix in FORMATS:
            return read_file((folder or Path()) / path, wanted)
        if name.is_file():
            if split == config.test:
                raise ConfigError(
                    f"data.test is {split!r}, and data.name is one file; allowed: a "
                    "file, or empty to set aside a fifth of that one"
                )
            return read_file(name, wanted)
        if folder is not None:
            found = [folder / f"{split}{suffix}" for suffix in FORMATS]
            found = [path for path in found if path.is_file()]
            if not found:
                raise ConfigError(
                    f"data.name is {config.name!r}, a folder without a file for split "
                    f"{split!r}; allowed: {split} with one of {', '.join(FORMATS)}"
                )
            return read_file(found[0], wanted)
        # A name without an owner may be a loader's: `pandas` unpickles what it finds.
        if not _HUB_ID.fullmatch(preset.hub):
            raise _not_found(config.name, "no file or folder, nor OWNER/NAME")
        import datasets

        datasets.disable_progress_bars()
        redact_hub_logs()
        try:
            builder = datasets.load_dataset_builder(preset.hub)
            check_data_files(preset.hub, builder.config.data_files)
            builder.download_and_prepare()
            rows = builder.as_dataset(split=split)
        except ConfigError:
            raise
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            # From None, since a traceback would show what is redacted in the message.
            raise _not_found(config.name, redact(error)) from None
        return _of_dataset(rows, wanted)

    return load


def check_data_files(hub: str, data_files: Mapping[str, Sequence[str]] | None) -> None:
    """Raise ConfigError if a data set of the Hub names files beside its own.

    Its README says which files are its data: any path on this machine, if it likes. A
    data set that is in the library's cache names none.
    """
    for path in chain.from_iterable((data_files or {}).values()):
        if not path.startswith(f"hf://datasets/{hub}@") or "::" in path:
            raise ConfigError(
                f"data.name is {hub!r}, a data set that names the file "
                f"{printable(path)}; allowed: data sets of the Hub whose data files "
                "are their own"
            )


def _not_found(name: str, why: str) -> ConfigError:
    return ConfigError(
        f"data.name is {name!r}; allowed: {', '.join(PRESETS)}, a file or "
        "folder that is there (for `flwr run` by its absolute path, since it does not "
        "start in your folder), a name below $SLORA_ASSETS/data, or a Hub id that can "
        f"be reached ({why})"
    )


def _of_dataset(rows: Any, wanted: Sequence[str]) -> Table:
    """Return the wanted columns of a data set, with the names of numbered labels."""
    columns = {name: list(rows[name]) for name in rows.column_names if name in wanted}
    for name, values in columns.items():
        if named := getattr(rows.features[name], "int2str", None):
            columns[name] = [None if i in (None, -1) else named(i) for i in values]
    return Table(rows.column_names, columns)


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what.

    Attributes
    ----------
    text : list[str]
        Those of the texts or prompts, which are joined; empty if `messages` is given.
    label, response, messages, by : str
        Those of the labels, the responses, the conversations and the groups; empty for
        none.
    dialogues : bool
        Whether the texts are dialogues.
    """

    text: list[str]
    label: str = ""
    response: str = ""
    messages: str = ""
    by: str = ""
    dialogues: bool = False

    @classmethod
    def of(
        cls, config: DataConfig, preset: Preset, by: str, *, dialogues: bool
    ) -> "Columns":
        """Return the columns that a config names or, where it names none, a preset."""
        text = _names(config.text or preset.text)
        if not dialogues:
            return cls(text, config.label or preset.label, by=by)
        if config.messages:
            return cls([], messages=config.messages, by=by, dialogues=True)
        # A text of one's own choice is learned itself, unless there is a response.
        response = config.response or ("" if config.text else preset.response)
        if response in text:
            allowed = "a column that data.text lacks, or prompts would hold the answers"
            raise refuse("data.response", response, allowed)
        return cls(text, response=response, by=by, dialogues=True)

    @property
    def names(self) -> list[str]:
        """All columns."""
        others = (self.label, self.response, self.messages, self.by)
        return [*self.text, *filter(None, others)]

    def read(self, table: Table, split: str) -> Texts:
        """Return the texts in a table.

        Raises
        ------
        ConfigError
            If a column, a label or a group is missing, or holds something else than
            text or numbers; if a value of `messages` is no conversation.
        """
        plain = [("data.text", name) for name in self.text]
        plain += [
            (key, name)
            for key, name in (
                ("data.label", self.label),
                ("data.response", self.response),
                ("clients.by", self.by),
            )
            if name
        ]
        _check_columns(table, plain)
        groups = (
            _whole(table.columns[self.by], f"clients.by names {self.by!r}")
            if self.by
            else []
        )
        if not self.dialogues:
            labels = _whole(
                table.columns[self.label], f"data.label names {self.label!r}"
            )
            return Texts(_join(table, self.text, split), labels, groups)
        dialogues = self._dialogues(table)
        texts = list(map(text_of, dialogues))
        return Texts(texts, groups or [""] * len(texts), dialogues=dialogues)

    def read_unlabelled(self, table: Table, split: str) -> Texts:
        """Return the texts, or the dialogues in which a response is due; see `read`."""
        _check_columns(table, [("data.text", name) for name in self.text])
        if not self.dialogues:
            texts = _join(table, self.text, split)
            return Texts(texts, [""] * len(texts))
        if self.messages:
            dialogues = self._conversations(table, is_prompt=True)
        else:
            dialogues = list(map(ask, self._parts(table)))
        return Texts([*map(text_of, dialogues)], [""] * len(dialogues), [], dialogues)

    def _parts(self, table: Table) -> list[tuple[str, ...]]:
        """Return each row's text, by column."""
        columns = (map(_text, table.columns[name]) for name in self.text)
        return list(zip(*columns, strict=True))

    def _dialogues(self, table: Table) -> list[Dialogue]:
        if self.messages:
            return self._conversations(table)
        prompts = self._parts(table)
        if not self.response:
            return [answered([], "\n".join(filter(None, parts))) for parts in prompts]
        responses = map(_text, table.columns[self.response])
        return [
            answered(ask(parts), response)
            for parts, response in zip(prompts, responses, strict=True)
        ]

    def _conversations(
        self, table: Table, *, is_prompt: bool = False
    ) -> list[Dialogue]:
        if self.messages not in table.names:
            raise ConfigError(
                f"data.messages names {self.messages!r}; the columns are "
                f"{', '.join(table.names)}"
            )
        found = []
        for number, value in enumerate(table.columns[self.messages], start=1):
            try:
                found.append(read_messages(value, is_prompt=is_prompt))
            except ValueError as error:
                raise ConfigError(
                    f"data.messages names {self.messages!r}: row {number}: {error}"
                ) from None
        return found


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _whole(column: Sequence[Any], named: str) -> list[str]:
    """Return the values of a column that may not lack any."""
    missing = [row for row, x in enumerate(column, start=1) if x is None or x != x]
    if missing:
        raise ConfigError(
            f"{named}, which is missing in {len(missing)} of {len(column)} rows, "
            f"counted from 1: {', '.join(map(str, shorten(missing)))}"
        )
    return [str(value) for value in column]


def _check_columns(table: Table, wanted: Iterable[tuple[str, str]]) -> None:
    for key, name in wanted:
        if name not in table.names:
            raise ConfigError(
                f"{key} names {name!r}; the columns are {', '.join(table.names)}"
            )
        for number, value in enumerate(table.columns[name], start=1):
            if isinstance(value, dict | list | bytes):
                raise ConfigError(
                    f"{key} names {name!r}, which holds a {type(value).__name__} in "
                    f"row {number}; allowed: text or numbers"
                )
            if isinstance(value, str) and not is_unicode(value):
                raise ConfigError(
                    f"{key} names {name!r}, which holds {printable(repr(value))} in "
                    f"row {number}; allowed: characters that UTF-8 has"
                )


def _join(table: Table, names: Sequence[str], split: str) -> list[str]:
    """Return the texts in a table's columns, one a row."""
    parts = [map(_text, table.columns[name]) for name in names]
    rows = list(zip(*parts, strict=True))
    if empty := sum(not any(part.strip() for part in row) for row in rows):
        warning = "data.text: %d of %d rows of %s have no text"
        logging.getLogger(__name__).warning(warning, empty, len(rows), split)
    return ["\n".join(row) for row in rows]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _check_classes(config: DataConfig, classes: list[str]) -> None:
    """Raise ConfigError if there is one class only; warn of labels that look alike."""
    if len(classes) < 2:
        raise ConfigError(
            f"data.label: data {config.name!r} has the label {', '.join(classes)} "
            "alone; allowed: data with two or more"
        )
    for alike in lookalikes(classes):
        told = printable(", ".join(map(ascii, alike)))
        warning = "labels that look alike are different classes: %s"
        logging.getLogger(__name__).warning(warning, told)
