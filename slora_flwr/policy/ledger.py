"""What all runs together have used of a node: bytes, seconds and privacy.

It is a file in the policy's folder, read and written under a lock. What is used is
counted before it is used, so that a node that is killed has counted too much.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from slora_flwr.common.files import make_folder, read_regular, write_atomically
from slora_flwr.policy.audit import HEAD, LOG
from slora_flwr.policy.policy import Most, PolicyFileError
from slora_flwr.policy.rules import PolicyError, reason
from slora_flwr.privacy.accountant import Release, epsilon, unite
from slora_flwr.runs.lock import turns

NAME, LOCK = "ledger.json", "ledger.lock"


@dataclass
class Used:
    """What one run has used.

    Attributes
    ----------
    bytes : int
        The bytes of its replies.
    seconds : float
        The seconds of its training and evaluation.
    reserved : dict[str, float]
        The seconds that messages under way may take. Those of a message whose node was
        killed stay.
    releases : list[Release]
        The noised sums of single examples.
    """

    bytes: int
    seconds: float
    reserved: dict[str, float]
    releases: list[Release]


_FILE = TypeAdapter(dict[str, Used])


class Ledger:
    """A node's ledger.

    Parameters
    ----------
    folder : Path
        The policy's folder.
    most : Most
        The limits of all runs together.

    Raises
    ------
    PolicyFileError
        If the ledger is missing beside a log, or cannot be made.
    """

    def __init__(self, folder: Path, most: Most) -> None:
        self._folder, self._most = folder, most
        with self._turn():
            if (folder / NAME).exists():
                return
            for other in (LOG, HEAD):
                if (folder / other).exists():
                    raise PolicyFileError(f"{folder} has a {other} and no {NAME}")
            self._write({})

    def runs(self) -> dict[str, Used]:
        """Return what each run has used, by its id.

        Raises
        ------
        PolicyFileError
            If the file cannot be read.
        """
        path = self._folder / NAME
        try:
            return _FILE.validate_json(read_regular(path))
        except (OSError, ValueError) as error:
            raise PolicyFileError(f"{path} cannot be read ({error})") from error

    def check(self) -> None:
        """Raise PolicyError if nothing is left of what runs may use together."""
        runs, most = self.runs(), self._most
        if most.bytes is not None and total_bytes(runs) >= most.bytes:
            raise _used_up("bytes", most.bytes)
        if most.seconds is not None and total_seconds(runs) >= most.seconds:
            raise _used_up("seconds", most.seconds)
        if most.epsilon is not None and total_epsilon(runs, most) >= most.epsilon:
            raise _used_up("epsilon", most.epsilon)

    def add_bytes(self, run: int, count: int) -> None:
        """Count the bytes of a reply before it is sent.

        Raises
        ------
        PolicyError
            If all runs together would have sent too many.
        """
        with self._turn():
            runs, most = self.runs(), self._most.bytes
            if most is not None and total_bytes(runs) + count > most:
                raise _used_up("bytes", most)
            _entry(runs, run).bytes += count
            self._write(runs)

    def reserve(self, run: int, wanted: float) -> tuple[str, float]:
        """Count the seconds that a message may take, and return their name and number.

        They are `wanted`, or as many as are left.

        Raises
        ------
        PolicyError
            If none are left.
        """
        with self._turn():
            runs, most = self.runs(), self._most.seconds
            if most is not None:
                wanted = min(wanted, most - total_seconds(runs))
                if wanted <= 0:
                    raise _used_up("seconds", most)
            name = uuid4().hex
            _entry(runs, run).reserved[name] = wanted
            self._write(runs)
        return name, wanted

    def settle(self, run: int, name: str, seconds: float) -> None:
        """Count the seconds that a message took in place of those it might take."""
        with self._turn():
            runs = self.runs()
            used = _entry(runs, run)
            del used.reserved[name]
            used.seconds += seconds
            self._write(runs)

    def add_release(self, run: int, release: Release) -> None:
        """Count noised sums of single examples before they are made.

        Raises
        ------
        PolicyError
            If all runs together would spend too much.
        """
        with self._turn():
            runs, most = self.runs(), self._most
            used = _entry(runs, run)
            used.releases = [*unite([*used.releases, release])]
            if most.epsilon is not None and total_epsilon(runs, most) > most.epsilon:
                raise _used_up("epsilon", most.epsilon)
            self._write(runs)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        try:
            make_folder(self._folder)
            with turns(self._folder / LOCK):
                yield
        except OSError as error:
            raise PolicyFileError(
                f"{self._folder} cannot be written ({error})"
            ) from error

    def _write(self, runs: dict[str, Used]) -> None:
        data = _FILE.dump_json(runs, indent=1)
        write_atomically(self._folder / NAME, data, durably=True)


def total_bytes(runs: dict[str, Used]) -> int:
    """Return the bytes that runs have sent."""
    return sum(used.bytes for used in runs.values())


def total_seconds(runs: dict[str, Used]) -> float:
    """Return the seconds that runs have taken, and that messages under way may take."""
    return sum(used.seconds + sum(used.reserved.values()) for used in runs.values())


def total_epsilon(runs: dict[str, Used], most: Most) -> float:
    """Return the epsilon that runs have spent together, at the policy's delta."""
    releases = [release for used in runs.values() for release in used.releases]
    return epsilon(releases, most.delta)


def _entry(runs: dict[str, Used], run: int) -> Used:
    return runs.setdefault(str(run), Used(0, 0.0, {}, []))


def _used_up(name: str, most: float) -> PolicyError:
    given = "too little is left of what all runs together may use"
    return PolicyError(reason(f"most.{name}", given, f"{most:g} in all"))
