"""The server of a local page that follows a run as it is written."""

import asyncio
import json
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from threading import Lock

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from slora_flwr.reports.page import render_body, render_watch, watch_script
from slora_flwr.reports.run_page import report
from slora_flwr.runs.events import EVENTS
from slora_flwr.runs.lock import is_locked
from slora_flwr.runs.reader import RunError, read_run
from slora_flwr.runs.tail import Place, lines_after
from slora_flwr.watch.told import tell

HOST = "127.0.0.1"
# Seconds between two looks at the file, and of silence until a sign of life.
LOOK, SILENCE = 0.5, 15.0
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; "
    "style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def make_app(
    find: Callable[[], Path | None],
    look: float = LOOK,
    has_ended: Callable[[], bool] = lambda: False,
) -> Starlette:
    """Return the application that shows a run.

    Parameters
    ----------
    find : Callable
        Returns the run directory to follow now; None while there is none.
    look : float
        Seconds between two looks at the run.
    has_ended : Callable
        Whether the server is to end, and streams with it.
    """
    lock = Lock()  # Matplotlib draws one chart at a time

    def page(request: Request) -> Response:
        return HTMLResponse(render_watch(), headers=_HEADERS)

    def script(request: Request) -> Response:
        kind = "text/javascript"
        return Response(watch_script(), media_type=kind, headers=_HEADERS)

    def body(request: Request) -> Response:
        path = find()
        try:
            if path is None:
                return Response(status_code=204, headers=_HEADERS)
            with lock:
                html = render_body(report(read_run(path)))
        except RunError:  # it is gone, or has not written all of its files
            return Response(status_code=204, headers=_HEADERS)
        return HTMLResponse(html, headers=_HEADERS)

    def events(request: Request) -> Response:
        place = Place.read(request.headers.get("last-event-id", ""))
        stream = follow(find, place, look, has_ended)
        kind = "text/event-stream"
        return StreamingResponse(stream, media_type=kind, headers=_HEADERS)

    return Starlette(
        routes=[
            Route("/", page),
            Route("/watch.js", script),
            Route("/report", body),
            Route("/events", events),
        ],
        # Another site's page could reach this server under a name of its own.
        middleware=[
            Middleware(
                TrustedHostMiddleware,
                allowed_hosts=[HOST, "localhost"],
                www_redirect=False,
            )
        ],
    )


async def follow(
    find: Callable[[], Path | None],
    place: Place,
    look: float = LOOK,
    has_ended: Callable[[], bool] = lambda: False,
) -> AsyncIterator[str]:
    """Yield server-sent events: a run's lines from a place on, and its state.

    Each line's id is the place after it. `anew` comes before lines that replace all
    earlier ones: of another run, or of one that was resumed from an earlier round.
    """
    before: tuple[Path | None, str] | None = None
    silent = 0.0
    seen: object = None
    while not has_ended():
        path = find()
        # What has not changed since is not read again.
        if before is not None and _marks(path) == seen:
            silent += look
            if silent >= SILENCE:
                yield ": here\n\n"
                silent = 0.0
            await asyncio.sleep(look)
            continue
        seen = _marks(path)
        state = await run_in_threadpool(_state, path)
        sent = ""
        if path is not None and state != "gone":
            try:
                found = await run_in_threadpool(lines_after, path / EVENTS, place)
            except OSError:  # deleted since
                seen = None
                await asyncio.sleep(look)
                continue
            if found.anew or (before is not None and before[0] not in (None, path)):
                if not found.anew:
                    found = await run_in_threadpool(lines_after, path / EVENTS, Place())
                sent += "event: anew\ndata: \n\n"
                place = Place()
            for place, line in found.lines:
                sent += f"id: {place}\ndata: {json.dumps(tell(line))}\n\n"
        if before != (path, state):
            name = "" if path is None else path.name
            data = json.dumps({"state": state, "run": name})
            sent += f"event: state\ndata: {data}\n\n"
            before = (path, state)
        silent = 0.0 if sent else silent + look
        if silent >= SILENCE:
            sent, silent = ": here\n\n", 0.0
        if sent:
            yield sent
        await asyncio.sleep(look)


def _marks(path: Path | None) -> object:
    """Return what changes when a run's state or its events do."""
    if path is None:
        return None
    found: list[object] = [path]
    for name in (EVENTS, "summary.json"):
        try:
            told = (path / name).stat()
            locked = is_locked(path / name)
        except OSError:  # not there, or no longer
            found.append(None)
        else:
            found.append((told.st_mtime_ns, told.st_size, told.st_ino, locked))
    return found


def _state(path: Path | None) -> str:
    if path is None:
        return "waiting"
    try:
        return read_run(path).state
    except (RunError, OSError):
        return "waiting" if (path / EVENTS).is_file() else "gone"


def serve(
    find: Callable[[], Path | None], port: int, tell_address: Callable[[str], None]
) -> None:
    """Serve the page of a run on the loopback interface, until Ctrl-C.

    Parameters
    ----------
    find : Callable
        As for `make_app`.
    port : int
        The port; 0 for a free one.
    tell_address : Callable
        Is given the page's address.

    Raises
    ------
    OSError
        If the port is taken.
    """
    with socket.create_server((HOST, port)) as listener:
        # Other users of this machine reach the port, but do not know the address.
        place = f"/{secrets.token_urlsafe(16)}"
        tell_address(f"http://{HOST}:{listener.getsockname()[1]}{place}/")
        app = make_app(find, has_ended=lambda: server.should_exit)
        config = uvicorn.Config(
            Starlette(routes=[Mount(place, app)]),
            log_level="critical",
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=5,
        )
        server = uvicorn.Server(config)
        server.run(sockets=[listener])
