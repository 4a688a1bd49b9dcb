"""The columns of a table that hold texts, labels, responses and groups."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from slora_flwr.common.text import is_unicode, printable, shorten
from slora_flwr.config import ConfigError, DataConfig, refuse
from slora_flwr.data.dialogues import Dialogue, answered, ask, read_messages, text_of
from slora_flwr.data.presets import Preset
from slora_flwr.data.shared_files import Table
from slora_flwr.data.texts import Texts


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
