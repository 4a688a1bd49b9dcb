"""Raw texts, each with what is to be learned of it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from slora_flwr.data.dialogues import Dialogue, ask


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


def prompts_of(texts: Sequence[str]) -> Texts:
    """Return dialogues that begin and end with a prompt each."""
    none = [""] * len(texts)
    return Texts([*texts], none, dialogues=[ask([text]) for text in texts])


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


def count_common(texts: Texts, others: Texts) -> int:
    """Return how many texts are also among others."""
    found = {*others.texts}
    return sum(text in found for text in texts.texts)


def of_classes(texts: Texts, classes: Sequence[str]) -> Texts:
    """Return the texts with one of some labels."""
    known = {*classes}
    return texts.select(np.array([name in known for name in texts.labels], dtype=bool))


def split_off(texts: Texts, share: float, purpose: str) -> tuple[Texts, Texts]:
    """Split off a share by a hash of each text, the same texts every time."""
    drawn = np.array([_hash(purpose, t) for t in texts.texts], dtype=np.float64)
    aside = drawn < share * 2.0**64
    return texts.select(~aside), texts.select(aside)


def _hash(purpose: str, text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=purpose.encode())
    return int.from_bytes(digest.digest())
