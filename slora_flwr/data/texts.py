"""Text classification data: train and test texts, and the tokenised task."""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slora_flwr.common.files import cache_folder, make_folder, write_atomically
from slora_flwr.common.text import redact, redact_hub_logs
from slora_flwr.config import ConfigError, DataConfig
from slora_flwr.data.examples import Examples

# Share set aside for testing in a data set without a test split.
TEST_SHARE = 0.2
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Preset:
    """A known data set: its Hub id, columns and splits."""

    hub: str
    text: str
    label: str
    test: str = ""


PRESETS = {
    "20newsgroups": Preset("SetFit/20_newsgroups", "text", "label_text", "test"),
    "news-category": Preset(
        "heegyu/news-category-dataset", "headline,short_description", "category"
    ),
}


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


def tokenise(
    config: DataConfig, tokenizer: Any, classes: list[str], texts: Texts
) -> Examples:
    """Tokenise once per machine; later processes read the arrays from the cache."""
    # Imported here, since a node that fails early needs neither.
    from safetensors.numpy import load_file, save

    # An earlier call's truncation would be part of the tokeniser's description.
    tokenizer.backend_tokenizer.no_truncation()
    described = tokenizer.backend_tokenizer.to_str()
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{config.max_length}\x1f{described}".encode())
    for text in texts.texts:
        digest.update(f"\x1e{text}".encode())
    path = cache_folder() / f"tokens-{digest.hexdigest()}.safetensors"
    if not path.is_file():
        encoded: list[list[int]] = []
        if texts.texts:
            encoded = tokenizer(
                texts.texts,
                truncation=True,
                max_length=config.max_length,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
        tokens = np.array([t for row in encoded for t in row], dtype=np.int32)
        offsets = np.cumsum([0, *(len(row) for row in encoded)], dtype=np.int64)
        write_atomically(path, save({"tokens": tokens, "offsets": offsets}))
    arrays = load_file(path)
    ids = {name: i for i, name in enumerate(classes)}
    return Examples(
        tokens=arrays["tokens"],
        offsets=arrays["offsets"],
        labels=np.array([ids[name] for name in texts.labels], dtype=np.int64),
        pad=tokenizer.pad_token_id,
    )


def _split(texts: Texts, share: float, purpose: str) -> tuple[Texts, Texts]:
    """Split off a share by a hash of each text, the same texts every time."""
    drawn = np.array([_hash(purpose, t) for t in texts.texts], dtype=np.float64)
    aside = drawn < share * 2.0**64
    return texts.select(~aside), texts.select(aside)


def _hash(purpose: str, text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=purpose.encode())
    return int.from_bytes(digest.digest())


def _load(config: DataConfig) -> tuple[Texts, Texts]:
    preset = PRESETS.get(config.name, Preset(config.name, "text", "label"))
    text, label = config.text or preset.text, config.label or preset.label
    load = _find(config, preset)
    train = _columns(load(config.train or "train"), text, label)
    test_split = config.test or preset.test
    if test_split:
        return train, _columns(load(test_split), text, label)
    return _split(train, TEST_SHARE, "test")


def _find(config: DataConfig, preset: Preset) -> Callable[[str], Any]:
    """Return the function that loads a split: from files, a folder or the Hub."""
    name = Path(config.name).expanduser()
    assets = Path(os.environ.get("SLORA_ASSETS", "")) / "data"
    folder = None
    if name.is_dir():
        folder = name
    elif "SLORA_ASSETS" in os.environ and _folder(assets, config.name):
        folder = _folder(assets, config.name)

    def load(split: str) -> Any:
        import datasets

        datasets.disable_progress_bars()
        redact_hub_logs()
        path = Path(split).expanduser()
        if path.suffix in FORMATS:
            return _read_file(path if path.is_absolute() else (folder or Path()) / path)
        if name.is_file():
            if split == config.test:
                raise ConfigError(
                    f"data.test is {split!r}, and data.name is one file; allowed: a "
                    "file, or empty to set aside a fifth of that one"
                )
            return _read_file(name)
        if folder is not None:
            found = [folder / f"{split}{suffix}" for suffix in FORMATS]
            found = [path for path in found if path.is_file()]
            if not found:
                raise ConfigError(
                    f"data.name is {config.name!r}, a folder without a file for split "
                    f"{split!r}; allowed: {split} with one of {', '.join(FORMATS)}"
                )
            return _read_file(found[0])
        # A name without an owner may be a loader's: `pandas` unpickles what it finds.
        if not _HUB_ID.fullmatch(preset.hub):
            raise _not_found(config.name, "no file or folder, nor OWNER/NAME")
        try:
            return datasets.load_dataset(preset.hub, split=split)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            # From None, since a traceback would show what is redacted in the message.
            raise _not_found(config.name, redact(error)) from None

    return load


def _not_found(name: str, why: str) -> ConfigError:
    return ConfigError(
        f"data.name is {name!r}; allowed: stdlib-docs, {', '.join(PRESETS)}, a file or "
        "folder that is there (absolute, since a run does not start in your folder), a "
        f"name below $SLORA_ASSETS/data, or a Hub id that can be reached ({why})"
    )


def _folder(assets: Path, name: str) -> Path | None:
    for candidate in (assets / name, assets / name.replace("-", "_")):
        if candidate.is_dir():
            return candidate
    return None


def _read_file(path: Path) -> Any:
    import datasets

    if path.suffix not in FORMATS:
        raise ConfigError(f"data file is {path}; allowed: {', '.join(FORMATS)}")
    if not path.is_file():
        raise ConfigError(
            f"data file {path} does not exist; allowed: an absolute path (a run does "
            "not start in your folder), or one inside the folder that data.name names"
        )
    # `datasets` keeps a copy, which must be private too.
    copies = cache_folder() / "datasets"
    make_folder(copies)
    return datasets.load_dataset(
        FORMATS[path.suffix],
        data_files=str(path),
        split="train",
        cache_dir=str(copies),
    )


def _columns(rows: Any, text: str, label: str) -> Texts:
    names = [name.strip() for name in text.split(",")]
    for key, name in [*(("data.text", n) for n in names), ("data.label", label)]:
        if name not in rows.column_names:
            raise ConfigError(
                f"{key} names {name!r}; the columns are {', '.join(rows.column_names)}"
            )
    parts = [
        ["" if value is None else str(value) for value in rows[name]] for name in names
    ]
    feature = rows.features[label]
    named = getattr(feature, "int2str", str)
    if any(value is None for value in rows[label]):
        raise ConfigError(f"data.label names {label!r}, which is missing in some rows")
    labels = [named(value) for value in rows[label]]
    return Texts(["\n".join(part) for part in zip(*parts, strict=True)], labels)
