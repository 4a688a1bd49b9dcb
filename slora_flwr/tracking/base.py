"""What a tracker is: it has a run's config, its figures by round, and its results."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from slora_flwr.config import Value


@dataclass(frozen=True)
class TrackedRun:
    """A run as its tracker begins with it, or goes on.

    Attributes
    ----------
    name : str
        The name of the run directory.
    config : dict[str, Value]
        The run's flat keys, without `run.dir` and `run.resume`.
    folder : Path
        A folder in the run directory for the tracker's own files.
    id : str
        The tracker's id of the run, of its first start; empty for a new run.
    after : int
        The round after which the tracker's record goes on; 0 for a new run.
    """

    name: str
    config: dict[str, Value]
    folder: Path
    id: str = ""
    after: int = 0

    @property
    def artefact(self) -> str:
        """A name for its files, of letters, digits, `.`, `_` and `-`."""
        return re.sub(r"[^\w.-]", "-", self.name, flags=re.ASCII)[:100]


class Tracker(Protocol):
    """Records a run in one library's store, or on its server.

    Whatever a method raises ends the tracker, never the run.

    Attributes
    ----------
    takes_back : bool
        Whether rounds after `TrackedRun.after` that it has are replaced by new ones.
    id : str
        What `TrackedRun.id` is to be when the run goes on.
    """

    takes_back: ClassVar[bool]
    id: str

    def __init__(self, run: TrackedRun) -> None: ...

    def log(self, number: int, figures: Mapping[str, float]) -> None:
        """Record the figures of a round."""

    def finish(self, artefacts: Sequence[Path], *, completed: bool) -> None:
        """Record the run's files and folders, whether it completed, and its end."""
