"""A proxy that exposes only the SuperLink's interface for nodes.

The SuperLink serves three interfaces on one port. The one for nodes requires the key of
a registered node. The one for the command line requires nothing: whoever reaches it can
run any code on the server and on every node. The third is for the ServerApp.
"""

import os
import re
import ssl

import httpx
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

# These headers describe a connection, not the message.
SKIPPED = {"host", "connection", "keep-alive", "transfer-encoding", "accept-encoding"}
superlink = httpx.AsyncClient(
    base_url=f"https://{os.environ.get('SLORA_SUPERLINK', 'superlink:8000')}",
    verify=ssl.create_default_context(cafile="/run/secrets/ca.crt"),
    timeout=60,
    trust_env=False,  # Docker may set a proxy, which cannot resolve this name
)


async def forward(request: Request) -> Response:
    """Forward a request unchanged, and return the answer."""
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
        return PlainTextResponse("the node disconnected", 400)
    except httpx.TransportError as error:
        # Nodes retry after this status.
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
