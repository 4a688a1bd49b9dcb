"""Lets nodes through to the SuperLink, and nobody to anything else of it.

The SuperLink serves three interfaces on one port: the nodes', which asks for the key of
a registered node; the command line's, which asks for nothing, so that whoever reaches
it can run code of his own on the server and on every node; and the ServerApp's.
"""

import re
import ssl

import httpx
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

# These describe one connection, not the message.
SKIPPED = {"host", "connection", "keep-alive", "transfer-encoding", "accept-encoding"}
superlink = httpx.AsyncClient(
    base_url="https://superlink:8000",
    verify=ssl.create_default_context(cafile="/run/secrets/ca.crt"),
    timeout=60,
    trust_env=False,  # Docker may set a proxy, which does not know this name
)


async def forward(request: Request) -> Response:
    """Hand a request on as it is, and the answer back."""
    path = request.url.path
    if path != "/health" and not re.fullmatch(r"/v1/fleet/[a-z-]+", path):
        return PlainTextResponse("Not Found", 404)
    headers = {k: v for k, v in request.headers.items() if k not in SKIPPED}
    body = request.stream() if request.method == "POST" else None
    try:
        answer = await superlink.send(
            superlink.build_request(
                request.method, path, headers=headers, content=body
            ),
            stream=True,
        )
    except ClientDisconnect:
        return PlainTextResponse("the node broke off", 400)
    except httpx.TransportError as error:
        # Nodes try again after this status.
        return PlainTextResponse(f"the SuperLink does not answer: {error!r}", 502)
    return StreamingResponse(
        answer.aiter_raw(),
        answer.status_code,
        {k: v for k, v in answer.headers.items() if k not in SKIPPED},
        background=BackgroundTask(answer.aclose),
    )


app = Starlette(
    routes=[
        Route("/health", forward),
        Route("/v1/fleet/{call}", forward, methods=["POST"]),
    ]
)
