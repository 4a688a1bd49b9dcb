"""The bases of a run on this machine's disk, each in a file named by its digest."""

from logging import WARNING
from pathlib import Path

from flwr.common.logger import log

from slora_flwr.client.errors import MismatchError, MissingBaseError
from slora_flwr.common.files import make_folder, write_atomically
from slora_flwr.wire.messages import BaseDelta
from slora_flwr.wire.state_channel import name_version


def find_base(delta: BaseDelta, folder: Path) -> bytes:
    """Return the bytes of a phase's first base, from the message or from the disk.

    Parameters
    ----------
    delta : BaseDelta
        What the message says of the base.
    folder : Path
        The run's folder.

    Raises
    ------
    MissingBaseError
        If it is in neither.
    MismatchError
        If the bytes in the message do not have its digest.
    """
    known, sent = delta.known, delta.start
    if sent is not None:
        if name_version(sent.data) != known:
            raise MismatchError("the base that was sent does not have its digest")
        return sent.data
    path = folder / _name(known)
    if not path.is_file():
        raise MissingBaseError(f"no base {known} here")
    data = path.read_bytes()
    if name_version(data) != known:
        raise MissingBaseError(f"base {known} is damaged here")
    return data


def keep_base(delta: BaseDelta, folder: Path) -> None:
    """Write a phase's first base to the run's folder, if the message has it."""
    if delta.start is None:
        return
    try:
        make_folder(folder)
        write_atomically(folder / _name(delta.known), delta.start.data)
    except OSError as error:
        # It will be sent again when it is needed again.
        log(WARNING, "the base is not kept: %s", error)


def _name(digest: str) -> str:
    # Via bytes, so that a digest from the network cannot be a path.
    return f"base-{bytes.fromhex(digest).hex()}"
