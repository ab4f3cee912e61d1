"""The connection loop: one socket from its handshake to its end."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

import structlog
from starlette.datastructures import Headers

from imstream.gateway.frame_handler import FrameHandler, SessionDeps
from imstream.gateway.session import Session, client_address, client_lang, client_origin, offered_subprotocols
from imstream.gateway.websocket_protocol import SocketClosed, SocketProtocol
from imstream.guards.guard import Handshake
from imstream.logs import LIMITED
from imstream.texts import Text, localize
from imstream.wire import SUBPROTOCOL, USER_ID_FIELD, CloseCode, Code

log = structlog.get_logger()
limited = structlog.get_logger(**LIMITED)


async def serve_socket(socket: SocketProtocol, deps: SessionDeps) -> None:
    """Answer the handshake of a socket, and handle its frames until either side closes it."""
    if _reject_handshake(socket, deps):
        return
    session = Session(socket, deps.settings, deps.scheduler)
    handler = FrameHandler(session, deps)
    has_bad_user = session.url_user is None and USER_ID_FIELD in socket.request.query_params
    try:
        socket.accept(SUBPROTOCOL if SUBPROTOCOL in offered_subprotocols(socket.request) else None)
        if deps.registry.is_full:
            session.close(CloseCode.NODE_FULL, Text.NODE_FULL)
        else:
            deps.registry.add(session)
        if has_bad_user:
            session.close(CloseCode.BAD_USER_ID, Text.BAD_USER_ID)
        code = await _receive(socket, session, handler)
    finally:
        deps.registry.remove(session)
        session.stop()
        if session.user_id is not None:
            deps.presence.on_disconnect(session.user_id)
    # Quietly before a login, or strangers could fill the log.
    level = log.debug if session.user_id is None else log.info
    seconds = round(asyncio.get_running_loop().time() - session.began_at, 1)
    level(
        "session closed",
        user=session.user_id,
        peer=session.peer,
        code=code,
        seconds=seconds,
        slowed=session.throttled,
    )


async def _receive(socket: SocketProtocol, session: Session, handler: FrameHandler) -> int:
    """Handle messages until the socket is closed; its close code."""
    loop = asyncio.get_running_loop()
    while not isinstance(message := await socket.receive(), SocketClosed):
        if session.closing_since is not None:
            continue
        session.heard_at = loop.time()
        if isinstance(message, str):
            await handler.handle(message)
        else:
            session.writer.send(session.frames.system(Code.BAD_REQUEST, Text.TEXT_ONLY))
        await session.writer.drain()
    return int(message.code)


def _reject_handshake(socket: SocketProtocol, deps: SessionDeps) -> bool:
    """Reject a handshake that is not for us, not allowed, or cannot be served now; whether it was rejected."""
    request = socket.request
    if request.scope["path"] != "/ws":
        socket.reject(HTTPStatus.FORBIDDEN)
    elif (verdict := deps.guards.check_handshake(Handshake(_joined(request.headers)))) is not None:
        client = {"peer": client_address(request), "origin": client_origin(request)}
        limited.info("handshake refused", reason=verdict.reason, **client)
        socket.reject(HTTPStatus.FORBIDDEN, localize(verdict.sentence, client_lang(request)))
    elif (why := deps.not_ready()) is not None:
        # Instead of a socket that can do nothing: a load balancer tries another node at once.
        socket.reject(HTTPStatus.SERVICE_UNAVAILABLE, f"not ready: {why}", [("Retry-After", "1")])
    elif deps.registry.is_full and "x-forwarded-for" in request.headers:
        # The same. Without a load balancer, the client is told on the socket to come back later.
        socket.reject(HTTPStatus.SERVICE_UNAVAILABLE, "too many sockets")
    else:
        return False
    return True


def _joined(headers: Headers) -> dict[str, str]:
    """Headers by name; several of one name are one list with commas (RFC 9110, section 5.3).

    A load balancer may append its X-Forwarded-For to that of a client, which can claim anything.
    """
    return {name: ", ".join(headers.getlist(name)) for name in headers.keys()}  # noqa: SIM118 - not a dict
