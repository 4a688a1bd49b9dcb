"""A run config as a TOML file that explains each of its keys."""

import textwrap
from collections.abc import Iterator

import tomli_w

from slora_flwr.config.keys import flatten, list_keys
from slora_flwr.config.sections import RunConfig

WIDTH = 88


def write_template(config: RunConfig) -> str:
    """Return a TOML file of all keys, with help, allowed values and defaults."""
    return "\n".join(_lines(config)) + "\n"


def _lines(config: RunConfig) -> Iterator[str]:
    yield "# A run config: every key of slora-flwr. Run it with `slora run -c FILE`."
    yield "# A key that is left out has its default."
    values, section = flatten(config), ""
    for key in list_keys():
        yield ""
        if key.section != section:
            section = key.section
            yield f"[{section}]"
        for text in (key.help, f"Allowed: {key.allowed}."):
            lines = textwrap.wrap(text, WIDTH - 2, break_on_hyphens=False)
            yield from (f"# {line}" for line in lines)
        last = key.name.rpartition(".")[2]
        yield f"# Default: {_literal(last, key.default).partition(' = ')[2]}"
        yield _literal(last, values[key.name])


def _literal(name: str, value: object) -> str:
    return tomli_w.dumps({name: value}).rstrip("\n")
