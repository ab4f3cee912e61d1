"""The routes of a node: the socket, the page, and what a load balancer asks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import structlog
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from imstream.gateway.deps import SessionDeps
from imstream.gateway.page import page_routes
from imstream.gateway.session import Session, asked_lang, origin_of, peer_of
from imstream.guards.guard import Handshake
from imstream.logs import LIMITED
from imstream.texts import localize

limited = structlog.get_logger(**LIMITED)


def joined(headers: Headers) -> dict[str, str]:
    """The headers; several lines of one name are one list with commas (RFC 9110, section 5.3).

    A balancer may put its X-Forwarded-For behind that of a client, which says what it likes.
    """
    found = defaultdict[str, list[str]](list)
    for name, value in headers.items():
        found[name].append(value)
    return {name: ", ".join(values) for name, values in found.items()}


def make_app(
    services: SessionDeps, *, not_ready: Callable[[], str | None], stuck: Callable[[], str | None]
) -> Starlette:
    """The ASGI application of one node.

    Args:
        services: What its sessions use.
        not_ready: Why the node cannot serve right now; None when it can.
        stuck: Why the node will not come back by itself; None when all is well or can become so.
    """
    node = services.settings.node

    async def socket(websocket: WebSocket) -> None:
        refused = services.guards.handshake(Handshake(joined(websocket.headers)))
        if refused is not None:
            who = {"peer": peer_of(websocket), "origin": origin_of(websocket)}
            limited.info("handshake refused", reason=refused.reason, **who)
            text = localize(refused.sentence, asked_lang(websocket))
            await websocket.send_denial_response(PlainTextResponse(text, status_code=403))
        elif (why := not_ready()) is not None:
            # Instead of a socket that could do nothing: a load balancer takes its user to another node at once.
            refusal = PlainTextResponse(f"not ready: {why}", status_code=503, headers={"Retry-After": "1"})
            await websocket.send_denial_response(refusal)
        elif services.registry.is_full and "x-forwarded-for" in websocket.headers:
            # The same; nobody is behind a load balancer without it, and told by the socket itself to come back later.
            await websocket.send_denial_response(PlainTextResponse("too many sockets", status_code=503))
        else:
            await Session(websocket, services).run()

    async def readyz(_: Request) -> JSONResponse:
        why = not_ready()
        body = {
            "ready": why is None,
            "node": node,
            "sessions": len(services.registry),
            "running": len(services.jobs),
            "refused": services.guards.refused,
        }
        return JSONResponse(body if why is None else {**body, "why": why}, status_code=200 if why is None else 503)

    async def healthz(_: Request) -> JSONResponse:
        why = stuck()
        body = {"alive": why is None, "node": node}
        return JSONResponse(body if why is None else {**body, "why": why}, status_code=200 if why is None else 503)

    return Starlette(
        routes=[
            WebSocketRoute("/ws", socket),
            Route("/readyz", readyz),
            Route("/healthz", healthz),
            *page_routes(),
        ]
    )
