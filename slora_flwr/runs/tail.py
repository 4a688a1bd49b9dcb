"""The lines of a file that grows, and that may be cut back."""

import re
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from slora_flwr.common.files import read_regular

# Bytes before a place by which it is known again.
_KNOWN = 4096


@dataclass(frozen=True)
class Place:
    """The end of a line of a file.

    Attributes
    ----------
    end : int
        Bytes before it.
    digest : int
        A checksum of the last of them, which differ if the file was cut back since and
        has grown again.
    """

    end: int = 0
    digest: int = 0

    @classmethod
    def read(cls, text: str) -> "Place":
        """Return the place that a text of `str` names; the start for any other text."""
        found = re.fullmatch(r"(\d{1,15})-(\d{1,10})", text, re.ASCII)
        return cls(int(found[1]), int(found[2])) if found else cls()

    def __str__(self) -> str:
        return f"{self.end}-{self.digest}"

    def is_in(self, data: bytes) -> bool:
        """Return whether a file of these bytes still has what was read up to here."""
        return self == _place(data, self.end)


@dataclass(frozen=True)
class Lines:
    """Whole lines after a place, each with the place after it.

    `anew` is true if they are those from the start, since the file was cut back.
    """

    lines: list[tuple[Place, bytes]]
    anew: bool = False


def lines_after(path: Path, place: Place) -> Lines:
    """Return the whole lines after a place; a line that is half-written is none yet.

    Raises
    ------
    OSError
        If it is not a regular file, or cannot be read.
    """
    data = read_regular(path)
    anew = not place.is_in(data)
    at = 0 if anew else place.end
    found = []
    while (end := data.find(b"\n", at)) >= 0:
        found.append((_place(data, end + 1), data[at:end]))
        at = end + 1
    return Lines(found, anew)


def _place(data: bytes, end: int) -> Place:
    return Place(end, crc32(data[max(0, end - _KNOWN) : end]))
