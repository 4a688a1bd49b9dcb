"""Run config values as a command line gives them: TOML files and key=value, merged."""

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from slora_flwr.common.files import expand
from slora_flwr.config.errors import ConfigError, refuse
from slora_flwr.config.keys import list_keys
from slora_flwr.config.sections import Value

# A value is in quotes, with escapes in double ones as in TOML, or has no spaces.
_WORD = re.compile(
    r"""\s*(?:([A-Za-z][\w.-]*)=('[^']*'|"(?:\\.|[^"\\])*"|\S*)|(\S+))(?=\s|$)"""
)
_SUFFIX = ".toml"


def merge_arguments(arguments: Iterable[str]) -> dict[str, Value]:
    """Return flat run config values; later arguments override earlier ones.

    An argument is the path of a TOML file or `key=value key2=value2`. A string needs no
    quotes unless it holds spaces.

    Raises
    ------
    ConfigError
        If an argument is neither, or a file cannot be read. Keys and values are left to
        `slora_flwr.config.parse`.
    """
    merged: dict[str, Value] = {}
    for argument in arguments:
        merged |= read_file(Path(argument)) if _is_file(argument) else _read(argument)
    return merged


def read_file(path: Path) -> dict[str, Value]:
    """Return the flat run config values in a TOML file.

    Raises
    ------
    ConfigError
        If it cannot be read.
    """
    try:
        text = expand(path).read_text(encoding="utf-8-sig")
        return flatten_tables(tomllib.loads(text))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read ({error})") from error


def flatten_tables(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a TOML document's values by flat keys, each after its tables and a dot."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        key = prefix + name
        inner = isinstance(value, dict)
        flat |= flatten_tables(value, f"{key}.") if inner else {key: value}
    return flat


def _is_file(argument: str) -> bool:
    if not argument.endswith(_SUFFIX):
        return False
    try:
        return "=" not in argument or expand(argument).is_file()
    except OSError:  # it is too long for a path
        return False


def _read(argument: str) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for key, text, other in _words(argument):
        if not other:
            values[key] = _value(key, text)
        elif other.endswith(_SUFFIX):
            values |= read_file(Path(other))
        else:
            allowed = "key=value key2=value2, or a TOML file; values with spaces quoted"
            raise refuse("-c", argument, allowed)
    return values


def _words(argument: str) -> Iterator[tuple[str, str, str]]:
    """Yield each key and its value's text, or what is no key=value."""
    at, end = 0, len(argument.rstrip())
    while at < end:
        found = _WORD.match(argument, at)
        if found is None:  # a quote that does not end the value
            yield "", "", argument[at:]
            return
        yield found[1] or "", found[2] or "", found[3] or ""
        at = found.end()


def _value(key: str, text: str) -> Any:
    """Return a value as TOML reads it, or the text if it is a string without quotes."""
    kinds = {known.name: known.type for known in list_keys()}
    is_quoted = text[:1] in ("'", '"')
    if kinds.get(key) == "string" and not is_quoted:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        if is_quoted:
            raise refuse(key, text, "a string in quotes, as in TOML") from error
        return text
