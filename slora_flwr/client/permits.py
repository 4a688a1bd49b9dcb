"""What a run config may have a node open: nothing on its disk but what it allows."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context

from slora_flwr.config import OWN_DATA, RunConfig, flatten
from slora_flwr.data.node_files import OwnDataError
from slora_flwr.data.shared_files import only_within

# Keys that may name files, which a simulated node opens.
_NAMED = ["model.name", "data.name", "data.train", "data.test"]


def check_data(config: RunConfig, context: Context) -> None:
    """Raise OwnDataError if a node that has data of its own should use other data."""
    if "data-path" in context.node_config and not config.data.is_own:
        raise OwnDataError(
            f"data.name is {config.data.name!r}; allowed: {OWN_DATA}, since this "
            "node's config has a data-path"
        )


def check_paths(config: RunConfig, context: Context) -> None:
    """Raise for a run that would open files here that the node's config does not allow.

    A name is looked up below `$SLORA_ASSETS` and on the Hub. A path must be in that
    folder, or in one of the node config's `allowed-folders`. It need not exist, since
    the error would tell whether it does.

    Raises
    ------
    OwnDataError
        Names the key.
    """
    roots = _roots(context)
    # With data of its own, a node opens no data that a run names.
    keys = ["model.name"] if config.data.is_own else _NAMED
    flat = flatten(config)
    for key in keys:
        given = str(flat[key])
        path = Path(given).expanduser()
        is_name = not (path.is_absolute() or ".." in path.parts or path.exists())
        if not given or is_name:
            continue
        if not any(path.resolve().is_relative_to(root) for root in roots):
            raise OwnDataError(
                f"{key} is {given!r}; allowed on this node: a name, or a path in a "
                f"folder of allowed-folders, now {[*map(str, roots)]}"
            )


@contextmanager
def restricted(context: Context) -> Iterator[None]:
    """Open no data file that the node's config does not allow; mask all errors.

    What `check_paths` lets through may still be, or hold, a link to elsewhere.
    """
    with masked(), only_within(_roots(context)):
        yield


@contextmanager
def masked() -> Iterator[None]:
    """Make every error an `OwnDataError`, whose text does not leave the node.

    Errors of other libraries quote rows, columns and paths.
    """
    try:
        yield
    except (OwnDataError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # such as a panic of Rust, of a tokeniser
        raise OwnDataError(f"{type(error).__name__}: {error}") from error


def _roots(context: Context) -> list[Path]:
    """Return the folders whose files a run may name on this node."""
    folders = str(context.node_config.get("allowed-folders", "")).split(",")
    folders = [*folders, os.environ.get("SLORA_ASSETS", "")]
    named = [folder.strip() for folder in folders if folder.strip()]
    return [Path(folder).expanduser().resolve() for folder in named]
