"""The keys of the run config by their flat names, as Flower and files have them."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from functools import cache
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from slora_flwr.common.text import printable, redact
from slora_flwr.config.allowed import Allowed
from slora_flwr.config.errors import ConfigError, refuse
from slora_flwr.config.other_names import translate
from slora_flwr.config.rules import check
from slora_flwr.config.sections import RunConfig, Value

# TOML's name for a key's type, and the words for it in errors.
_TYPES: dict[Any, tuple[str, str]] = {
    bool: ("boolean", "true or false"),
    int: ("integer", "a whole number"),
    float: ("float", "a number"),
    str: ("string", "a string"),
}


@dataclass(frozen=True)
class Key:
    """One key of the run config.

    Attributes
    ----------
    name : str
        As in `--run-config`: the section and a dot, then words joined by hyphens.
    section : str
        Its TOML table; empty for none.
    type : str
        `boolean`, `integer`, `float` or `string`.
    default : Value
        Its value if a config omits it.
    allowed : str
        Its allowed values; other keys may restrict them further.
    help : str
        What it is for, in one or two sentences.
    """

    name: str
    section: str
    type: str
    default: Value
    allowed: str
    help: str


@cache
def list_keys() -> tuple[Key, ...]:
    """Return all keys, section by section, those without a section first."""
    return tuple(
        Key(
            name,
            section,
            _TYPES[field.annotation][0],
            field.default,
            _allowed(field),
            field.description or "",
        )
        for name, (section, _, field) in _fields().items()
    )


def parse(values: Mapping[str, Value]) -> RunConfig:
    """Return a checked run config from flat keys, as in `Context.run_config`.

    Parameters
    ----------
    values : Mapping[str, Value]
        Kebab-case keys, each after its section and a dot; omitted keys have defaults.

    Raises
    ------
    ConfigError
        For an unknown key, a wrong type or an impossible value; its message names the
        key, what was given and what is allowed.
    """
    fields = _fields()
    sections: dict[str, dict[str, Value]] = {}
    for key, value in values.items():
        if key not in fields:
            meant = " or ".join(_meant(key))
            hint = f"did you mean {meant}?" if meant else f"known: {', '.join(fields)}"
            raise ConfigError(f"{printable(key)} is not a run config key; {hint}")
        if redact(value) != str(value):
            # It would end up in config.toml, in checkpoints and on every node.
            raise ConfigError(
                f"{key} is an address with a password or a query, not repeated here; "
                "allowed: names and paths"
            )
        section, name, _ = fields[key]
        sections.setdefault(section, {})[name] = value
    own = sections.pop("", {})
    kinds = _fields_of(RunConfig)
    made = {n: _make(n, kinds[n].annotation, given) for n, given in sections.items()}
    config: RunConfig = _make("", RunConfig, own | made)
    check(config)
    return config


def flatten(config: RunConfig) -> dict[str, Value]:
    """Return a run config as flat keys, the inverse of `parse`."""
    flat: dict[str, Value] = {}
    for key, (section, name, _) in _fields().items():
        owner = getattr(config, section) if section else config
        flat[key] = getattr(owner, name)
    return flat


@cache
def _fields() -> dict[str, tuple[str, str, FieldInfo]]:
    """Return each key's section, field name and field."""
    found = {}
    for outer, field in _fields_of(RunConfig).items():
        if is_dataclass(field.annotation):
            for inner, own in _fields_of(field.annotation).items():
                found[f"{outer}.{_kebab(inner)}"] = outer, inner, own
        else:
            found[_kebab(outer)] = "", outer, field
    return found


def _meant(key: str) -> list[str]:
    """Return the keys that an unknown one may stand for."""
    if other := translate(key):
        return [other]
    fields = _fields()
    given, _, last = key.replace("_", "-").rpartition(".")
    if not given or given not in {section for section, _, _ in fields.values()}:
        named: dict[str, list[str]] = {}
        for name in fields:
            named.setdefault(name.rpartition(".")[2], []).append(name)
        for word in difflib.get_close_matches(last, named, n=1, cutoff=0.75):
            # Phases only override what is so called there.
            general = [name for name in (word, f"train.{word}") if name in fields]
            return general or named[word]
    return difflib.get_close_matches(key, fields, n=1)


def _make(section: str, kind: Any, values: Mapping[str, Any]) -> Any:
    """Return a section, or the whole config, from unchecked values."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):  # from an entry point
            raise cause from cause.__cause__
        name = str(first["loc"][0])
        key = f"{section}.{_kebab(name)}".lstrip(".")
        if isinstance(cause, ValueError):
            raise refuse(key, *cause.args) from None
        field = _fields_of(kind)[name]
        raise refuse(key, first["input"], _TYPES[field.annotation][1]) from None


def _fields_of(kind: Any) -> dict[str, FieldInfo]:
    """Return the fields of a section, or of the whole config."""
    fields: dict[str, FieldInfo] = kind.__pydantic_fields__
    return fields


def _allowed(field: FieldInfo) -> str:
    words = [known.words() for known in field.metadata if isinstance(known, Allowed)]
    return words[-1] if words else _TYPES[field.annotation][1]


def _kebab(name: str) -> str:
    return name.replace("_", "-")
