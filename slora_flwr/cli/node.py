"""`slora node check` and `slora node log`: a node's policy, and what the node did."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from slora_flwr.cli.options import (
    RunConfigOption,
    ending_cleanly,
    fail,
    merge_values,
)
from slora_flwr.common.text import printable
from slora_flwr.config import ConfigError, parse

PolicyOption = Annotated[
    Path | None,
    typer.Option(help="The policy; default: the one that $SLORA_POLICY names."),
]


def check(policy: PolicyOption = None, run_config: RunConfigOption = None) -> None:
    """Print what a node's policy allows, and what all runs together have used of it.

    With a run config, also whether a run of it would be refused, and why: then the exit
    status is 1.
    """
    from slora_flwr.common.code_digest import code_digest
    from slora_flwr.policy.policy import read_policy, stated

    with ending_cleanly(OSError):
        path = _find(policy)
        known = read_policy(path)
        typer.echo(f"policy {path}; code {code_digest()}")
        limits = stated(known)
        width = max(map(len, limits), default=0)
        for key, value in limits.items():
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            typer.echo(f"{key:{width}}  {shown}")
        if not limits:
            typer.echo("It limits nothing.")
        for line in _usage(path, known):
            typer.echo(line)
        if run_config is None:
            return
        from slora_flwr.policy.rules import list_reasons, needs_digest

        config = parse(merge_values(run_config))
        reasons = list_reasons(known, config)
        for reason in reasons:
            typer.echo(f"refused: {reason}")
        if reasons:
            raise typer.Exit(1)
        typer.echo("A run of this config is allowed.")
        if needs_digest(known, config):
            typer.echo(
                "It is refused all the same if its model's weights have none of the "
                "digests in models, which the node finds out."
            )


def show_log(
    policy: PolicyOption = None,
    state: Annotated[
        Path | None,
        typer.Option(help="The folder of the log; default: the policy's."),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(help="The digest of a line, noted before, that must be there."),
    ] = None,
) -> None:
    """Print what a node was asked, did and sent, and check that nobody changed the log.

    The exit status is 1 if somebody did. The last line printed is the digest of the
    log's last line. Note it elsewhere: with --head it shows later whether the log was
    written anew.
    """
    from slora_flwr.policy.audit import LOG, read_log
    from slora_flwr.policy.policy import PolicyFileError, read_policy, state_folder

    with ending_cleanly(OSError):
        if state is None:
            path = _find(policy)
            state = state_folder(path, read_policy(path))
        last, digests = "", set()
        try:
            for entry, last in read_log(state):
                typer.echo(_line(entry))
                digests.add(last)
        except PolicyFileError as error:
            raise fail(f"{state / LOG}: {error}", 1) from error
        if head is not None and head not in digests:
            told = f"no line has the digest {printable(head)}: it was written anew"
            raise fail(f"{state / LOG}: {told}", 1)
        typer.echo(f"head {last}")


def _find(policy: Path | None) -> Path:
    named = policy or os.environ.get("SLORA_POLICY")
    if not named:
        raise ConfigError("no policy is named; allowed: --policy FILE, or SLORA_POLICY")
    return Path(named)


def _usage(path: Path, policy: Any) -> Iterator[str]:
    """Yield what runs have used, if there has been any."""
    from slora_flwr.policy.ledger import (
        NAME,
        Ledger,
        total_bytes,
        total_epsilon,
        total_seconds,
    )
    from slora_flwr.policy.policy import state_folder

    folder = state_folder(path, policy)
    if not (folder / NAME).exists():
        return
    runs = Ledger(folder, policy.most).runs()
    yield (
        f"used by {len(runs)} runs: {total_bytes(runs)} bytes, "
        f"{total_seconds(runs):.0f} seconds"
    )
    if policy.most.epsilon is not None:
        spent, delta = total_epsilon(runs, policy.most), policy.most.delta
        yield f"epsilon spent: {spent:.4g} at delta {delta:g}"


_SHOWN = "from server-round phase attempt bytes sha256 code error reason torn config"


def _line(entry: dict[str, Any]) -> str:
    """Return an entry of the log in a line."""
    first = [entry.get(key, "-") for key in ("number", "time", "run", "kind", "event")]
    rest = [f"{key}={entry[key]}" for key in _SHOWN.split() if key in entry]
    return printable(" ".join(map(str, [*first, *rest])), 4000)
