"""A node's resident worker: the process that keeps the backbone between messages.

In deployment Flower starts a process for every message. That process forwards the
message over a Unix socket to the resident worker, so torch is imported and the backbone
loaded only once. In simulation Flower's own processes last, and handle messages
themselves.
"""

import os
import select
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from logging import INFO, WARNING
from multiprocessing.connection import Client, Connection
from pathlib import Path

from flwr.app import Context, Message
from flwr.common.logger import log

from slora_flwr.client.protocol import (
    END,
    HANDLE,
    TEXT_LIMIT,
    error_frames,
    message_frames,
    read_message,
    read_reply,
    reply_frames,
    write,
)
from slora_flwr.common.code_digest import code_digest

# Default and limit of `resident-seconds`: how long the worker outlives a message.
DEFAULT_SECONDS, MOST_SECONDS = 600.0, 86_400.0
WATCH_SECONDS = 1.0

_PACKAGE = Path(__file__).parents[1]


class ResidentError(RuntimeError):
    """There is no resident worker, or it did not answer."""


def handle(message: Message, context: Context) -> Message:
    """Return the reply of the node's resident worker to a message.

    Parameters
    ----------
    message : Message
        A query, train or evaluate message.
    context : Context
        `resident-seconds` in its node config is how long the worker outlives a
        message; with 0 this process handles it. The handler's changes to the state are
        copied back.

    Raises
    ------
    Exception
        With the type and text of the handler's error.
    ResidentError
        If two workers in succession end in the middle of the message.
    """
    seconds = _seconds(context)
    if not seconds or in_simulation() or not hasattr(socket, "AF_UNIX"):
        return _handle_here(message, context)
    for _ in range(2):
        try:
            channel = _reach(context, seconds)
        except (OSError, ResidentError) as error:
            log(WARNING, "no resident worker (%s); handling the message here", error)
            return _handle_here(message, context)
        try:
            with channel:
                write(channel, HANDLE, *message_frames(message, context))
                reply, after = read_reply(channel)
        except (OSError, EOFError):
            log(WARNING, "the resident worker ended in the middle of a message")
            continue
        context.state = after.state
        return reply
    raise ResidentError("two resident workers ended in the middle of this message")


def _seconds(context: Context) -> float:
    given = context.node_config.get("resident-seconds", DEFAULT_SECONDS)
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MOST_SECONDS:
        raise ValueError(
            f"resident-seconds in the node config is {given!r}; allowed: 0 to "
            f"{MOST_SECONDS:.0f}"
        )
    return seconds


def in_simulation() -> bool:
    """Return whether this process is one of Flower's simulation."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _handle_here(message: Message, context: Context) -> Message:
    # Imported late: a process that only forwards need not wait for torch.
    from slora_flwr.client import handlers

    return handlers.HANDLERS[message.metadata.message_type](message, context)


# A worker serves one run, one version of the code and one launcher. One that differs in
# any of these ends and is replaced, so a node has one backbone in memory.
def _identity(run_id: int, launcher: int) -> str:
    return f"{code_digest()} {_PACKAGE} run {run_id} launcher {launcher}"


def _folder() -> Path:
    """Return the folder of the sockets, checked to be closed to other users."""
    path = Path(tempfile.gettempdir()) / f"slora-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    private = found.st_uid == os.getuid() and not found.st_mode & 0o077
    if not stat.S_ISDIR(found.st_mode) or not private:
        raise ResidentError(f"{path} is not a folder that only this user can open")
    return path


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock under which sockets are created, removed and connected to."""
    import fcntl  # Windows has neither this nor Unix sockets

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _reach(context: Context, seconds: float) -> Connection:
    """Connect to the node's resident worker; start one if none fits."""
    path = _folder() / f"{context.node_id}.sock"
    launcher = os.getppid()
    identity = _identity(context.run_id, launcher)
    # A worker may end before it sends its identity, or belong to another run.
    for _ in range(4):
        started = None
        try:
            with _locked(path.parent):
                try:
                    channel = Client(str(path), "AF_UNIX")
                except (FileNotFoundError, ConnectionRefusedError):
                    started = _start(path, context.run_id, launcher, seconds)
                    channel = Client(str(path), "AF_UNIX")
            if channel.recv_bytes(TEXT_LIMIT).decode() == identity:
                return channel
            with channel:
                write(channel, END)
                channel.recv_bytes(TEXT_LIMIT)  # sent once its socket is gone
        except (EOFError, ConnectionError) as error:
            if started is not None:
                status = started.wait()
                raise ResidentError(
                    f"it ended with status {status} as it started"
                ) from error
    raise ResidentError(f"no worker of this run answers at {path}")


def _start(
    path: Path, run_id: int, launcher: int, seconds: float
) -> subprocess.Popen[bytes]:
    """Start a resident worker on a socket that already accepts connections."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen()
        arguments = (listener.fileno(), path, run_id, launcher, seconds)
        return subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, *map(str, arguments)],
            # It runs the code of this process's bundle, and logs where this process
            # does: to the node's log.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )


def serve(
    listener: socket.socket, path: Path, run_id: int, launcher: int, seconds: float
) -> None:
    """Answer messages until none comes for some seconds, or one raises an exception.

    Parameters
    ----------
    listener : socket.socket
        The listening socket at `path`.
    run_id : int
        The run whose messages are answered.
    launcher : int
        Id of the process that launches the node's ClientApps; this one ends with it.
    seconds : float
        Seconds to wait for a message.
    """
    identity = _identity(run_id, launcher).encode()
    threading.Thread(target=_watch, args=(launcher, path), daemon=True).start()
    log(INFO, "resident worker %d of run %d", os.getpid(), run_id)
    ended = False
    while not ended:
        if not select.select([listener], [], [], seconds)[0]:
            with _locked(path.parent):
                if not select.select([listener], [], [], 0)[0]:
                    path.unlink(missing_ok=True)
                    return
        accepted, _ = listener.accept()
        try:
            with Connection(accepted.detach()) as channel:
                write(channel, identity)
                frames = [b"asked to"]
                if channel.recv_bytes(TEXT_LIMIT) != END:
                    frames = _answer(*read_message(channel))
                # An exception may leave bad state, such as a broken CUDA context, so
                # the process ends.
                if ended := bool(frames[0]):
                    with _locked(path.parent):
                        path.unlink(missing_ok=True)
                write(channel, *frames)
        except Exception as error:
            log(WARNING, "a ClientApp left before it had its reply (%s)", error)


def _answer(message: Message, context: Context) -> list[bytes]:
    """Return the frames of a reply, or of the error that the handler raised."""
    try:
        return reply_frames(_handle_here(message, context), context)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # such as a panic of Rust
        return error_frames(error)


def _watch(launcher: int, path: Path) -> None:
    """End this process, even in the middle of a message, once its launcher is gone."""
    while True:
        try:
            os.kill(launcher, 0)
        except ProcessLookupError:
            break
        except PermissionError:
            pass  # alive, as another user
        time.sleep(WATCH_SECONDS)
    try:
        with _locked(path.parent):
            path.unlink(missing_ok=True)
    finally:
        os._exit(0)


if __name__ == "__main__":
    _descriptor, _path, _run_id, _launcher, _idle = sys.argv[1:]
    serve(
        socket.socket(fileno=int(_descriptor)),
        Path(_path),
        int(_run_id),
        int(_launcher),
        float(_idle),
    )
