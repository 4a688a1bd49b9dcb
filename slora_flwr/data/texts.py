"""Text classification data: train and test texts, and the tokenised task."""

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

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
from slora_flwr.config import ConfigError, DataConfig
from slora_flwr.data.examples import Examples
from slora_flwr.data.presets import PRESETS, Preset
from slora_flwr.data.shared_files import FORMATS, Table, read_file

# Share set aside for testing in a data set without a test split.
TEST_SHARE = 0.2
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Texts:
    """Raw texts with the names of their labels."""

    texts: list[str]
    labels: list[str]

    def select(self, chosen: NDArray[np.bool_]) -> "Texts":
        """Return the rows where `chosen` is true."""
        rows = np.flatnonzero(chosen)
        return Texts([self.texts[r] for r in rows], [self.labels[r] for r in rows])


@dataclass(frozen=True)
class Task:
    """A classification task, tokenised.

    Attributes
    ----------
    classes : list[str]
        Label names, sorted; the index is the class id.
    train, test : Examples
        `train` is divided among the clients; the server evaluates on `test`.
    """

    classes: list[str]
    train: Examples
    test: Examples


def load_texts(config: DataConfig) -> tuple[Texts, Texts]:
    """Load train and test texts, the same on the server and on every node.

    Parameters
    ----------
    config : DataConfig
        The data. If `validation` is above 0, that share of the training data replaces
        the test data, and clients never see it.

    Raises
    ------
    ConfigError
        If the data or a column cannot be found.
    """
    if config.name == "stdlib-docs":
        from slora_flwr.data import stdlib_docs

        train, test = _split(Texts(*stdlib_docs.load()), TEST_SHARE, "test")
    else:
        train, test = _load(config)
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


def read_unlabelled(config: DataConfig, path: Path) -> list[str]:
    """Return the texts in a file: its lines, or the columns that the data has them in.

    Raises
    ------
    ConfigError
        If the file cannot be read, or lacks a column.
    """
    if path.suffix == ".txt":
        try:
            # `splitlines` also splits at characters that texts may hold.
            with path.open(encoding="utf-8-sig") as file:
                return [line.removesuffix("\n") for line in file]
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read ({error})") from error
    if path.suffix not in FORMATS:
        raise ConfigError(f"data file is {path}; allowed: .txt, {', '.join(FORMATS)}")
    if not path.exists():
        raise ConfigError(f"{path} cannot be read (No such file or directory)")
    names = _names(config.text or _preset(config).text)
    table = read_file(path, names)
    _check_columns(table, [("data.text", name) for name in names])
    return _join(table, names, path.name)


def at_most(count: int, texts: Texts) -> Texts:
    """Return `count` texts chosen by a hash; all if `count` is 0."""
    if not 0 < count < len(texts.texts):
        return texts
    order = np.argsort([_hash("max-test", text) for text in texts.texts])
    chosen = np.zeros(len(texts.texts), dtype=bool)
    chosen[order[:count]] = True
    return texts.select(chosen)


def make_task(
    config: DataConfig, tokenizer: Any, texts: tuple[Texts, Texts], classes: list[str]
) -> Task:
    """Return the task: tokenised texts with numbered labels."""
    train, test = texts
    encode = partial(tokenise, config, tokenizer, classes)
    return Task(classes, encode(train), encode(test))


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


def tokenise(
    config: DataConfig,
    tokenizer: Any,
    classes: list[str],
    texts: Texts,
    folder: Path | None = None,
) -> Examples:
    """Tokenise once per folder; later processes read the arrays from their file.

    Without a folder, it is the cache, which all runs on this machine share.
    """
    # Imported here, since a node that fails early needs neither.
    from safetensors.numpy import load_file, save

    # An earlier call's truncation would be part of the tokeniser's description.
    tokenizer.backend_tokenizer.no_truncation()
    described = tokenizer.backend_tokenizer.to_str()
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{config.max_length}\x1f{described}".encode())
    for text in texts.texts:
        digest.update(f"\x1e{text}".encode())
    with _writing_cache():
        folder = folder or cache_folder()
        make_folder(folder)
        path = folder / f"tokens-{digest.hexdigest()}.safetensors"
    if not path.is_file():
        tokens, offsets = _encode(config, tokenizer, texts.texts)
        with _writing_cache():
            write_atomically(path, save({"tokens": tokens, "offsets": offsets}))
    arrays = load_file(path)
    ids = {name: i for i, name in enumerate(classes)}
    return Examples(
        tokens=arrays["tokens"],
        offsets=arrays["offsets"],
        labels=np.array([ids[name] for name in texts.labels], dtype=np.int64),
        pad=tokenizer.pad_token_id,
    )


def tokenise_unlabelled(
    config: DataConfig, tokenizer: Any, texts: list[str]
) -> Examples:
    """Tokenise texts whose labels are not known, which are all 0; cache nothing."""
    tokens, offsets = _encode(config, tokenizer, texts)
    labels = np.zeros(len(texts), dtype=np.int64)
    return Examples(tokens, offsets, labels, tokenizer.pad_token_id)


def _encode(
    config: DataConfig, tokenizer: Any, texts: list[str]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return all texts' tokens in one array, and where each text begins and ends."""
    encoded: list[list[int]] = []
    if texts:
        encoded = tokenizer(
            texts,
            truncation=True,
            max_length=config.max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
    tokens = np.array([t for row in encoded for t in row], dtype=np.int32)
    return tokens, np.cumsum([0, *(len(row) for row in encoded)], dtype=np.int64)


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


def _load(config: DataConfig) -> tuple[Texts, Texts]:
    preset = _preset(config)
    text, label = config.text or preset.text, config.label or preset.label
    load = _find(config, preset)
    train_split, test_split = config.train or "train", config.test or preset.test
    wanted = [*_names(text), label]
    train = _columns(load(train_split, wanted), train_split, text, label)
    if test_split:
        test = load(test_split, wanted)
        return train, _columns(test, test_split, text, label)
    return _split(train, TEST_SHARE, "test")


def _preset(config: DataConfig) -> Preset:
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
        f"data.name is {name!r}; allowed: stdlib-docs, {', '.join(PRESETS)}, a file or "
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


def _columns(table: Table, split: str, text: str, label: str) -> Texts:
    """Return the texts and labels in a table.

    Raises
    ------
    ConfigError
        If a column or a label is missing, or holds something else than text or numbers.
    """
    names = _names(text)
    _check_columns(table, [*(("data.text", n) for n in names), ("data.label", label)])
    labels = _whole(table.columns[label], f"data.label names {label!r}")
    return Texts(_join(table, names, split), labels)


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
    parts = [
        ["" if value is None else str(value) for value in table.columns[name]]
        for name in names
    ]
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
