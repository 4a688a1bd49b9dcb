"""What commands share: `-c`, RUN, and how errors and Ctrl-C end them."""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import click
import typer
from typer.core import TyperCommand

from slora_flwr.config import ConfigError, Value
from slora_flwr.config.arguments import merge_arguments
from slora_flwr.data.paths import make_absolute

# As shells have them: 128 + SIGINT, and + SIGTERM.
INTERRUPTED, TERMINATED = 130, 143
# A word that can only be a run config key with its value.
_PAIR = re.compile(r"[A-Za-z][\w.-]*=.*", re.DOTALL)

RunConfigOption = Annotated[
    list[str] | None,
    typer.Option(
        "--run-config",
        "-c",
        metavar="VALUES",
        help="Run config values: key=value…, or a TOML file. May be repeated; later "
        "ones override earlier ones.",
    ),
]
RunArgument = Annotated[
    str | None,
    typer.Argument(
        help="Run directory, or its name below $SLORA_HOME/runs, its id, or the "
        "beginning of either; default: the newest run there."
    ),
]


def merge_values(run_config: list[str] | None) -> dict[str, Value]:
    """Return the values of `-c`, whose paths are relative to the current folder."""
    return make_absolute(merge_arguments(run_config or []))


class MergingCommand(TyperCommand):
    """A command whose `-c` takes all the key=value words that follow it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse arguments after repeating `-c` before such words."""
        repeated: list[str] = []
        follows = False
        for number, word in enumerate(args):
            begins = number > 0 and args[number - 1] in ("-c", "--run-config")
            follows = begins or (follows and bool(_PAIR.fullmatch(word)))
            repeated += ["-c"] * (follows and not begins) + [word]
        # Words too many are looked at here.
        ctx.allow_extra_args = True
        super().parse_args(ctx, repeated)
        if ctx.args and not ctx.resilient_parsing:
            given = " ".join(ctx.args)
            if self._takes_values and all(map(_is_value, ctx.args)):
                allowed = f"run config values after it, as in -c {given}"
                raise fail(f"{given} does not follow -c; allowed: {allowed}", 2)
            ctx.fail(f"Got unexpected extra argument ({given})")
        return ctx.args

    @property
    def _takes_values(self) -> bool:
        return any("-c" in parameter.opts for parameter in self.params)


def _is_value(word: str) -> bool:
    return bool(_PAIR.fullmatch(word)) or word.endswith(".toml")


def fail(error: object, status: int) -> typer.Exit:
    """Print an error and return the exit that ends the command."""
    typer.echo(f"Error: {error}", err=True)
    return typer.Exit(status)


@contextmanager
def ending_cleanly(*failures: type[Exception]) -> Iterator[None]:
    """End a command with one line in place of a traceback.

    The exit status is 2 for `ConfigError` and `RunError`, 1 for `failures` and 130 for
    Ctrl-C.
    """
    from slora_flwr.runs.reader import RunError

    try:
        yield
    except (ConfigError, RunError) as error:
        raise fail(error, 2) from error
    except BrokenPipeError:  # of a reader, such as `head`, that has read enough
        raise
    except failures as error:
        raise fail(error, 1) from error
    except KeyboardInterrupt as error:
        typer.echo(f"\nInterrupted. {error}".rstrip(), err=True)
        raise typer.Exit(INTERRUPTED) from error


@contextmanager
def heeding_sigterm() -> Iterator[None]:
    """Have SIGTERM end a command as Ctrl-C does, with the exit status 143."""
    came = False

    def interrupt(*_: object) -> None:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except typer.Exit as error:
        if came and error.exit_code == INTERRUPTED:
            raise typer.Exit(TERMINATED) from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
