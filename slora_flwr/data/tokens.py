"""Texts' tokens, made once and kept in files that later processes read."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from slora_flwr.data.examples import Examples
from slora_flwr.data.kept import keep
from slora_flwr.data.texts import Texts


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
    from safetensors.numpy import load, save

    digest = hashlib.blake2b(digest_size=16)
    digest.update(encoder.description.encode())
    for text in map(json.dumps, texts.dialogues) if texts.dialogues else texts.texts:
        digest.update(f"\x1e{text}".encode())
    name = f"tokens-{digest.hexdigest()}.safetensors"
    kept = keep(name, lambda: save(encoder.encode(texts)), folder)
    labels = np.zeros(len(texts.texts), dtype=np.int64)
    if not texts.dialogues:
        labels[:] = number(texts.labels, classes)
    return Examples(**load(kept), labels=labels, pad=encoder.pad)


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
