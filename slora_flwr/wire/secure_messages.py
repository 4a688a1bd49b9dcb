"""The messages of secure aggregation beside training: keys, letters, shares.

A round has three. The server introduces the members to their neighbours, and they
answer with letters of sealed shares. It has them train, with the letters to each, and
they answer with masked sums. It asks those in the sum for their shares. The keys of a
round ride on a node's description, or on its letters of a round before.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from flwr.app import Array, ArrayRecord, ConfigRecord, MessageType, RecordDict

from slora_flwr.wire.messages import MessageError, by_number, read_number

# Types of messages: that introduces members, and that asks for shares.
INTRODUCE, TELL = f"{MessageType.QUERY}.introduce", f"{MessageType.QUERY}.tell"
# The entry of a node's description with its public keys.
KEYS = "keys"
# Flower's name for the format of masked numbers.
STYPE = "slora.masked"


@dataclass
class Introduction:
    """Who a node's neighbours are in an attempt at a round.

    Attributes
    ----------
    run, server_round, attempt : int
        As in `slora_flwr.secure.terms.Terms`.
    number : int
        The node's own number.
    own : bytes
        Its own public keys, by which it finds the private ones.
    neighbours : dict[int, bytes]
        What its neighbours show of their keys, by number.
    """

    run: int
    server_round: int
    attempt: int
    number: int
    own: bytes
    neighbours: dict[int, bytes]

    def content(self) -> RecordDict:
        """Return the records."""
        return _write(
            {
                "run": str(self.run),  # it can be beyond 63 bits
                "server-round": self.server_round,
                "attempt": self.attempt,
                "number": self.number,
                "own": self.own,
                "numbers": [*self.neighbours],
                "keys": [*self.neighbours.values()],
            }
        )

    @classmethod
    def read(cls, content: RecordDict) -> Self:
        """Return the introduction in some records.

        Raises
        ------
        MessageError
            If an entry is missing or invalid.
        """
        try:
            config = content.config_records["config"]
            return cls(
                run=read_number(config["run"]),
                server_round=read_number(config["server-round"]),
                attempt=read_number(config["attempt"]),
                number=read_number(config["number"]),
                own=_bytes(config["own"]),
                neighbours=by_number(config["numbers"], config["keys"]),
            )
        except _READING as error:
            raise _off(error) from error


@dataclass
class Letters:
    """A member's sealed shares for its neighbours.

    Attributes
    ----------
    letters : dict[int, bytes]
        By the number of the neighbour who can open it.
    commitment : bytes
        Shows later whether a recovered seed is the member's.
    keys : bytes
        Public keys for the next round in which the node takes part.
    """

    letters: dict[int, bytes]
    commitment: bytes
    keys: bytes

    def content(self) -> RecordDict:
        """Return the records."""
        return _write(
            {
                "readers": [*self.letters],
                "letters": [*self.letters.values()],
                "commitment": self.commitment,
                KEYS: self.keys,
            }
        )

    @classmethod
    def read(cls, content: RecordDict) -> Self:
        """Return the letters in some records; see `Introduction.read`."""
        try:
            config = content.config_records["config"]
            return cls(
                by_number(config["readers"], config["letters"]),
                _bytes(config["commitment"]),
                _bytes(config[KEYS]),
            )
        except _READING as error:
            raise _off(error) from error


@dataclass
class MaskedReport:
    """A node's answer after training: the masked sum of its clients' updates.

    Attributes
    ----------
    server_round, phase, fingerprint
        As in the instruction.
    masked : bytes
        The masked numbers, and the masked figures.
    clients : list[int]
        The clients in the sum.
    failures : dict[int, str]
        The clients that failed, with reasons.
    wire : list[int]
        As in `Report`.
    """

    server_round: int
    phase: int
    fingerprint: str
    masked: bytes
    clients: list[int]
    failures: dict[int, str] = field(default_factory=dict)
    wire: list[int] = field(default_factory=list)

    def content(self) -> RecordDict:
        """Return the records."""
        array = Array("uint8", (len(self.masked),), STYPE, self.masked)
        entries = {
            "server-round": self.server_round,
            "phase": self.phase,
            "fingerprint": self.fingerprint,
            "clients": self.clients,
        }
        # Flower cannot count the bytes of an empty list.
        if self.wire:
            entries["wire"] = self.wire
        if self.failures:
            entries["failed"] = [*self.failures]
            entries["reasons"] = [*self.failures.values()]
        content = _write(entries)
        content["arrays"] = ArrayRecord({"update": array})
        return content

    @classmethod
    def read(cls, content: RecordDict) -> Self:
        """Return the report in some records; see `Introduction.read`."""
        try:
            config: Mapping[str, Any] = content.config_records["config"]
            array = content.array_records["arrays"]["update"]
            if (array.stype, array.dtype) != (STYPE, "uint8"):
                raise ValueError(f"its array is {array.stype} of {array.dtype}")
            failed, reasons = config.get("failed", []), config.get("reasons", [])
            return cls(
                read_number(config["server-round"]),
                read_number(config["phase"]),
                str(config["fingerprint"]),
                array.data,
                [*map(read_number, config["clients"])],
                {read_number(c): str(r) for c, r in zip(failed, reasons, strict=True)},
                [*map(read_number, config.get("wire", []))],
            )
        except _READING as error:
            raise _off(error) from error


@dataclass
class Question:
    """Whose shares a member is to tell, in an attempt at a round.

    Attributes
    ----------
    server_round, attempt : int
        As in `Introduction`.
    alive, dead : list[int]
        Those of whom the seed's share is asked, and those of whom the mask key's is.
    """

    server_round: int
    attempt: int
    alive: list[int]
    dead: list[int]

    def content(self) -> RecordDict:
        """Return the records."""
        entries: dict[str, Any] = {
            "server-round": self.server_round,
            "attempt": self.attempt,
        }
        for name, numbers in (("alive", self.alive), ("dead", self.dead)):
            if numbers:  # Flower cannot count the bytes of an empty list
                entries[name] = numbers
        return _write(entries)

    @classmethod
    def read(cls, content: RecordDict) -> Self:
        """Return the question in some records; see `Introduction.read`."""
        try:
            config: Mapping[str, Any] = content.config_records["config"]
            return cls(
                read_number(config["server-round"]),
                read_number(config["attempt"]),
                [*map(read_number, config.get("alive", []))],
                [*map(read_number, config.get("dead", []))],
            )
        except _READING as error:
            raise _off(error) from error


def write_shares(shares: Mapping[int, bytes]) -> RecordDict:
    """Return the records of shares, by whose they are."""
    return _write({"of": [*shares], "shares": [*shares.values()]})


def read_shares(content: RecordDict) -> dict[int, bytes]:
    """Return the shares in some records.

    Raises
    ------
    MessageError
        If an entry is missing or invalid.
    """
    try:
        config = content.config_records["config"]
        return by_number(config["of"], config["shares"])
    except _READING as error:
        raise _off(error) from error


_READING = (KeyError, TypeError, ValueError, OverflowError)


def _write(entries: Mapping[str, Any]) -> RecordDict:
    return RecordDict({"config": ConfigRecord(dict(entries))})


def _off(error: Exception) -> MessageError:
    return MessageError(f"the message's records are off: {error!r}")


def _bytes(given: Any) -> bytes:
    if type(given) is not bytes:
        raise TypeError(f"{type(given).__name__} in place of bytes")
    return given
