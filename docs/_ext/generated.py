"""Parts of pages that are written from the code: a page names one in a comment."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import get_type_hints

import click
import typer
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

from slora_flwr.cli import app as command_line
from slora_flwr.config import list_keys
from slora_flwr.config.methods import ADAPTERS, find_adapter, list_methods
from slora_flwr.policy.policy import list_policy_keys
from slora_flwr.runs.release import KEPT, RELEASED

MARK = re.compile(r"^<!-- generated: ([a-z-]+) -->$", re.MULTILINE)


def write_keys() -> Iterator[str]:
    """Yield an entry for each key of the run config, with a heading a section."""
    section = None
    for key in list_keys():
        if key.section != section:
            section = key.section
            yield f"\n## {f'`[{section}]`' if section else 'The run'}\n"
        yield f"```{{confval}} {key.name}"
        yield f":type: {key.type}"
        yield f":default: `{json.dumps(key.default)}`"
        yield f"\n{key.help}\n\nAllowed: {key.allowed}."
        yield "```\n"


def write_rates() -> Iterator[str]:
    """Yield a table of the adapters' default learning rates."""
    yield "| adapter | default learning rate |"
    yield "|---|---|"
    for adapter in ADAPTERS:
        yield f"| `{adapter}` | {find_adapter(adapter).default_lr:g} |"


def write_methods() -> Iterator[str]:
    """Yield a table of the methods."""
    yield "| `method` | phases | what it is |"
    yield "|---|---|---|"
    for name, method in list_methods().items():
        phases = ", then ".join(f"`{phase.adapter}`" for phase in method.phases)
        number = method.paper.removeprefix("arXiv ")
        paper = f" ([{number}](https://arxiv.org/abs/{number}))" if number else ""
        yield f"| `{name}` | {phases} | {method.help}{paper} |"


def write_commands() -> Iterator[str]:
    """Yield a section for each command of `slora`."""
    yield from _write_group("slora", typer.main.get_command(command_line))


def _write_group(prefix: str, group: click.Command) -> Iterator[str]:
    assert isinstance(group, click.Group)
    with click.Context(group, info_name=prefix) as parent:
        for name, command in group.commands.items():
            whole = f"{prefix} {name}"
            if isinstance(command, click.Group):
                yield from _write_group(whole, command)
                continue
            context = click.Context(command, info_name=name, parent=parent)
            yield f"\n## `{whole}`\n"
            yield f"{command.help}\n"
            pieces = " ".join(command.collect_usage_pieces(context))
            yield f"```text\n{whole} {pieces}\n```\n"
            # Not from the parameters: click 8.5 drops the help of typer's arguments.
            hints = get_type_hints(command.callback, include_extras=True)
            for parameter in command.params:
                names = parameter.make_metavar(context)
                if isinstance(parameter, click.Option):
                    kind = [] if parameter.is_flag else [names]
                    names = " ".join([", ".join(parameter.opts), *kind])
                [declared] = hints[str(parameter.name)].__metadata__
                yield f"`{names}`\n: {declared.help.replace('<', '&lt;')}"
                if parameter.default:
                    yield f"  Default: `{parameter.default}`."
                yield ""


def write_policy() -> Iterator[str]:
    """Yield a table of the keys of a node's policy."""
    yield "| key | what it allows or demands | allowed |"
    yield "|---|---|---|"
    for key in list_policy_keys():
        yield f"| `{key.name}` | {key.help} | {key.allowed} |"


def write_released() -> Iterator[str]:
    """Yield a table of the files that may leave the server with privacy."""
    yield from _write_files(RELEASED)


def write_kept() -> Iterator[str]:
    """Yield a table of the files that stay with the server with privacy."""
    yield from _write_files(KEPT)


def _write_files(files: Mapping[str, str]) -> Iterator[str]:
    yield "| file | holds |"
    yield "|---|---|"
    for name, content in files.items():
        yield f"| `{name}` | {content} |"


GENERATED: dict[str, Callable[[], Iterator[str]]] = {
    "commands": write_commands,
    "kept": write_kept,
    "keys": write_keys,
    "methods": write_methods,
    "policy": write_policy,
    "rates": write_rates,
    "released": write_released,
}


def fill(app: Sphinx, page: str, source: list[str]) -> None:
    """Replace the comments of a page by what they name."""
    source[0] = MARK.sub(lambda mark: "\n".join(GENERATED[mark[1]]()), source[0])


def list_filled(app: Sphinx, env: BuildEnvironment, *changes: set[str]) -> list[str]:
    """Return the pages that are read anew in every build: the code may have changed."""
    return [p for p in env.found_docs if MARK.search(env.doc2path(p).read_text())]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    app.connect("source-read", fill)
    app.connect("env-get-outdated", list_filled)
    return {"parallel_read_safe": True}
