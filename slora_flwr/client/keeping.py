"""What a node keeps on its disk for a run: where, until when, and how much."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import cast

from flwr.app import ConfigRecord, Context

from slora_flwr.client.residuals import RECORD
from slora_flwr.common.files import cache_folder, run_folder

DEFAULT_GIGABYTES = 20.0
_RUN = "run"


def remember(context: Context, lineage: int) -> None:
    """Note the run's lineage for `kept_in`; a run that is resumed has the same."""
    context.state[_RUN] = ConfigRecord({"lineage": str(lineage)})  # beyond 63 bits


def kept_in(context: Context) -> Path:
    """Return the folder of what this node keeps for a run; it may not exist."""
    return run_folder(_lineage(context))


def remove(context: Context, lineage: int) -> None:
    """Remove what this node keeps for a run that has ended."""
    for number in {lineage, _lineage(context)}:
        shutil.rmtree(run_folder(number), ignore_errors=True)
    context.state.pop(RECORD, None)


def limit(context: Context, gigabytes: float | None = None) -> None:
    """Delete the oldest files of the cache while there are too many bytes.

    They are too many beyond the node config's `cache-gigabytes`, and beyond
    `gigabytes` if that is given.

    A node that is sent something large may exceed the limit for as long as the message
    takes. What is lost is made or sent again.

    Raises
    ------
    ValueError
        If the node config's `cache-gigabytes` is no number from 0.
    """
    given = context.node_config.get("cache-gigabytes", DEFAULT_GIGABYTES)
    try:
        most = float(given) * 1e9
    except ValueError:
        most = -1.0
    if not most >= 0:
        raise ValueError(
            f"cache-gigabytes in the node config is {given!r}; allowed: numbers from 0"
        )
    if gigabytes is not None:
        most = min(most, gigabytes * 1e9)
    found = []
    with suppress(OSError):
        # Files that another process removes meanwhile are no longer of interest.
        for path in cache_folder().rglob("*"):
            with suppress(OSError):
                if path.is_file():
                    told = path.stat()
                    found.append((told.st_mtime_ns, told.st_size, path))
    kept = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if kept <= most:
            return
        with suppress(OSError):
            path.unlink()
            kept -= size


def _lineage(context: Context) -> int:
    """Return the run's lineage; Flower's run id before the first query."""
    told = context.state.config_records.get(_RUN)
    return int(cast(str, told["lineage"])) if told else context.run_id
