"""Text of other libraries and machines, made fit to print, compare and tabulate."""

import logging
import re
import unicodedata
from collections.abc import Collection, Iterable
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

# The user and password of an address; and its query, which may hold a signature. Both
# patterns run in linear time, since the text may be hostile.
_USER = re.compile(r"(?<=://)[^\s/?#'\"]*@")
_QUERY = re.compile(r"(://[^\s?#'\"]*)(\?[^\s#'\"]+)?")


def redact(text: object) -> str:
    """Return a text with users, passwords and queries removed from its addresses.

    The Hub's libraries quote the addresses that they requested, which may hold a
    password if `HF_ENDPOINT` names a mirror with one. They do not quote `HF_TOKEN`.
    """
    known = _USER.sub("***@", str(text))
    return _QUERY.sub(lambda found: found[1] + ("?***" if found[2] else ""), known)


def redact_hub_logs() -> None:
    """Redact what the Hub's library logs; call it once the library is imported."""
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_redact_record)


def _redact_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = redact(record.getMessage()), None
    return True


def printable(text: object, most: int = 300) -> str:
    """Return a text as one short line without control characters or passwords."""
    whole = redact(text)
    shown = (c if c.isprintable() else ascii(c)[1:-1] for c in whole[:most])
    more = f"… ({len(whole)} characters)" if len(whole) > most else ""
    return "".join(shown) + more


def is_unicode(text: str) -> bool:
    """Return whether UTF-8 has all characters: none is half of a pair of UTF-16's."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shorten(values: Collection[T], most: int = 20) -> list[T | str]:
    """Return the first values of many, and a text that says how many more there are."""
    shown: list[T | str] = list(islice(values, most))
    more = len(values) - len(shown)
    return [*shown, f"… and {more} more"] if more else shown


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun; `plural`, if not with s, unless it is 1."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def default_name(number: object) -> str:
    """Return the name of a node that has none, from its number or its id."""
    return f"node {number}"


def clean_label(text: str) -> str:
    """Return a label as it is compared: composed, without what a reader cannot see.

    Control, zero-width and bidirectional characters are dropped, and every run of
    blanks is one space, with none at the ends.
    """
    seen = (c for c in text if c.isprintable() or c.isspace())
    return " ".join(unicodedata.normalize("NFC", "".join(seen)).split())


def lookalikes(labels: Iterable[str]) -> list[list[str]]:
    """Return groups of labels that differ in case, width or what nobody sees."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        plain = unicodedata.normalize("NFKC", clean_label(label)).casefold()
        groups.setdefault(plain, []).append(label)
    return [group for group in groups.values() if len(group) > 1]


def csv_cell(value: object) -> object:
    """Return a cell's value, with text quoted that a spreadsheet would compute."""
    if not isinstance(value, str) or not value.lstrip().startswith(tuple("=+-@")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value
