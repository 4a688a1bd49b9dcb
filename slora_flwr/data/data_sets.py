"""Data sets: files, folders, those of the Hub and those of the running Python."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from slora_flwr.common.files import below_assets, expand
from slora_flwr.common.text import lookalikes, printable, redact, redact_hub_logs
from slora_flwr.config import ConfigError, DataConfig
from slora_flwr.data.columns import Columns
from slora_flwr.data.embedded import read_embedded
from slora_flwr.data.presets import DIALOGUES, PRESETS, Preset
from slora_flwr.data.shared_files import FORMATS, Table, read_file
from slora_flwr.data.texts import Texts, at_most, list_classes, prompts_of, split_off

# Share set aside for testing in a data set without a test split.
TEST_SHARE = 0.2
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


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
        train, test = split_off(train, config.validation, "validation")
    for given, key in ((train, "data.train"), (test, "data.test")):
        if not given.texts:
            raise ConfigError(
                f"{key}: data {config.name!r} leaves no examples to "
                f"{'train on' if given is train else 'evaluate on'}; allowed: data "
                "with at least one, after the split by data.validation or by a hash"
            )
    return train, at_most(config.max_test, test)


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


def _load(config: DataConfig, by: str, dialogues: bool) -> tuple[Texts, Texts]:
    preset = _preset(config, dialogues)
    columns = columns_read(config, by, dialogues=dialogues)
    if not preset.hub:
        whole = columns.read(read_embedded(config.name), config.name)
        return split_off(whole, TEST_SHARE, "test")
    load = _find(config, preset)
    train_split, test_split = config.train or "train", config.test or preset.test

    def read(split: str) -> Texts:
        return columns.read(load(split, columns.names), split)

    train = read(train_split)
    if test_split:
        return train, read(test_split)
    return split_off(train, TEST_SHARE, "test")


def columns_read(config: DataConfig, by: str, *, dialogues: bool) -> Columns:
    """Return the columns that a run reads of its data set; see `load_texts`."""
    preset = _preset(config, dialogues)
    return Columns.of(config, preset, by or preset.by, dialogues=dialogues)


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
