"""`slora export`, `predict` and `chat`: what has come of a run, for use."""

import json
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from slora_flwr.cli.options import RunArgument, ending_cleanly
from slora_flwr.common.files import expand
from slora_flwr.common.text import printable
from slora_flwr.config import ConfigError, refuse


class Which(StrEnum):
    """The states that a run keeps."""

    LAST = "last"
    BEST = "best"
    AVERAGED = "averaged"


WhichOption = Annotated[
    Which,
    typer.Option(
        help="The averaged state, which the run evaluated; that of the best round; or "
        "the last one, without the average."
    ),
]


MaxTokensOption = Annotated[
    int | None,
    typer.Option(min=1, help="The most tokens of a response; default: 256."),
]


def export(
    run: RunArgument = None,
    which: WhichOption = Which.AVERAGED,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write a whole model, not an adapter.")
    ] = False,
    to: Annotated[
        Path | None,
        typer.Option(help="New or empty folder; default: ./NAME-WHICH."),
    ] = None,
) -> None:
    """Export a finished run's model in a format that stock libraries load."""
    from slora_flwr.runs.reader import find_run

    with ending_cleanly(OSError):
        path = find_run(run).resolve()
        name = f"{path.name}-{which}" + ("-merged" if merge else "")
        to = Path(name) if to is None else expand(to)
        from slora_flwr.server.export import export_run

        typer.echo(export_run(path, which, merge, to))


def predict(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN] [TEXT]...",
            help="RUN as for `slora report`, if another word or --file follows; then "
            "the texts.",
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="File of texts: a line each in a .txt file; in a table, such as .csv "
            "or .jsonl, the columns of the run's data.text or data.messages."
        ),
    ] = None,
    which: WhichOption = Which.AVERAGED,
    max_tokens: MaxTokensOption = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print a JSON object a line: with all probabilities, or prompt and "
            "response.",
        ),
    ] = False,
) -> None:
    """Print the label, its probability and the text, or the response, for each text."""
    from slora_flwr.runs.reader import find_run

    with ending_cleanly(OSError):
        run, texts = _divide(words or [], file)
        path = find_run(run)
        from slora_flwr.server.predict import predict_texts

        for found in predict_texts(path, which, texts, file, max_tokens):
            if as_json:
                typer.echo(json.dumps(found.facts, ensure_ascii=False))
            else:
                typer.echo(found.line)


def chat(
    run: RunArgument = None,
    which: WhichOption = Which.AVERAGED,
    max_tokens: MaxTokensOption = None,
) -> None:
    """Talk with a finished run's language model, a prompt a line.

    The dialogue is kept, and a blank line begins another. Ctrl-D or Ctrl-C ends it.
    """
    from slora_flwr.runs.reader import find_run

    with ending_cleanly(OSError):
        path = find_run(run)
        from slora_flwr.server.conversation import Conversation

        conversation = Conversation(path, which, max_tokens)
        try:
            for text in _prompts():
                if text.strip():
                    typer.echo(_lines(conversation.say(text)))
                else:
                    conversation.begin()
        except KeyboardInterrupt:  # the usual way out, in the middle of a line too
            typer.echo()


def _prompts() -> Iterator[str]:
    """Yield the lines of stdin; ask for each on a terminal."""
    mark = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while True:
        try:
            yield input(mark)
        except EOFError:
            if mark:
                typer.echo()
            return
        except UnicodeDecodeError as error:
            raise refuse("a line", error.reason, "characters that UTF-8 has") from error


def _lines(text: str) -> str:
    """Return a text of several lines, safe to print."""
    return "\n".join(printable(line, len(line)) for line in text.splitlines())


def _divide(words: list[str], file: Path | None) -> tuple[str | None, list[str]]:
    """Return the run, None for the newest, and the texts."""
    if file is not None and len(words) > 1:
        raise ConfigError(f"TEXT is {words[1]!r}; allowed: none besides --file")
    if file is not None:
        return next(iter(words), None), []
    begins = bool(words) and _begins_with_run(words)
    run, texts = (words[0], words[1:]) if begins else (None, words)
    if not texts:
        why = f", since {words[0]} names a run" if words else ""
        raise ConfigError(f"TEXT is missing{why}; allowed: one or more, or --file")
    if not any(text.strip() for text in texts):
        raise ConfigError("TEXT is ''; allowed: a text that is not empty")
    return run, texts


def _begins_with_run(words: list[str]) -> bool:
    """Return whether the first word names a run; alone, a beginning is a text."""
    from slora_flwr.runs.reader import AmbiguousRunError, RunError, find_run, names_run

    if len(words) == 1:
        return names_run(words[0])
    try:
        find_run(words[0])
    except AmbiguousRunError:
        raise
    except RunError:
        return False
    return True
