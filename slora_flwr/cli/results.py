"""`slora export`, `push`, `predict` and `chat`: what has come of a run, for use."""

import json
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from slora_flwr.cli.options import RunArgument, ending_cleanly, fail
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


MergeOption = Annotated[
    bool, typer.Option("--merge", help="Write a whole model, not an adapter.")
]


def export(
    run: RunArgument = None,
    which: WhichOption = Which.AVERAGED,
    merge: MergeOption = False,
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


def push(
    run: Annotated[str, typer.Argument(help="Run, as for `slora export`.")],
    repo: Annotated[
        str, typer.Argument(help="Repository on the Hugging Face Hub: USER/NAME.")
    ],
    which: WhichOption = Which.AVERAGED,
    merge: MergeOption = False,
    public: Annotated[
        bool,
        typer.Option(
            "--public/--private",
            help="Whether a new repository is for all to see. One that exists stays as "
            "it is, and is refused if it is public and --public is not given.",
        ),
    ] = False,
    dry_run: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Send nothing; write what would be sent into a new or empty folder.",
        ),
    ] = None,
) -> None:
    """Push a finished run's model, with its model card, to the Hugging Face Hub.

    The token is that of `hf auth login` or HF_TOKEN.
    """
    from slora_flwr.runs.reader import find_run

    with ending_cleanly(OSError):
        path = find_run(run).resolve()
        from slora_flwr.server.export import export_run
        from slora_flwr.server.hub import HubError, check_repo, push_run

        check_repo(repo)
        if dry_run is not None:
            to = export_run(path, which, merge, expand(dry_run), repo)
            for file in sorted(to.iterdir()):
                typer.echo(f"{file.stat().st_size:>12,}  {file.name}")
            typer.echo(f"Nothing was sent to {repo}. What would be is in {to}.")
            return
        try:
            done = push_run(path, repo, which, merge, is_public=public)
        except HubError as error:
            raise fail(error, 1) from error
        seen = "private" if done.is_private else "public"
        typer.echo(f"{done.url} ({seen}), commit {done.commit}")


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
