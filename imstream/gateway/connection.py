"""The connection loop: one socket from its handshake to its end."""

import asyncio
from http import HTTPStatus

import structlog
from starlette.datastructures import QueryParams
from starlette.requests import HTTPConnection

from imstream.codes import CloseCode, Code
from imstream.gateway.frame_handler import FrameHandler
from imstream.gateway.frames import FrameBuilder
from imstream.gateway.session import Session
from imstream.gateway.session_deps import SessionDeps
from imstream.gateway.session_writer import SessionWriter
from imstream.gateway.websocket_protocol import SocketClosed, SocketProtocol
from imstream.logs import LIMITED, MAX_VALUE_LENGTH, sanitize
from imstream.texts import Lang, Text, choose_lang, localize
from imstream.wire import SUBPROTOCOL, USER_ID_FIELD

log = structlog.get_logger()
limited = structlog.get_logger(**LIMITED)


async def serve_socket(socket: SocketProtocol, deps: SessionDeps) -> None:
    """Answer the handshake of a socket, and handle its frames until either side closes it."""
    if _reject_handshake(socket, deps):
        return
    session = _accept_handshake(socket, deps)
    try:
        code = await _receive(session, FrameHandler(session, deps))
    finally:
        deps.registry.remove(session)
        session.stop()
        if session.user_id is not None:
            deps.presence.on_disconnect(session.user_id)
    deps.metrics.session_closed(code)
    level = log.debug if session.user_id is None else log.info  # else strangers could fill the log
    seconds = round(asyncio.get_running_loop().time() - session.began_at, 1)
    client = {"user": session.user_id, "peer": session.peer, "origin": session.origin}
    level("session closed", **client, code=code, seconds=seconds, slowed=session.throttled)


async def _receive(session: Session, handler: FrameHandler) -> int:
    """Handle messages until the socket is closed; its close code."""
    loop = asyncio.get_running_loop()
    while not isinstance(message := await session.socket.receive(), SocketClosed):
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
    # Several headers of one name are one list with commas (RFC 9110, section 5.3): a load balancer may append its
    # X-Forwarded-For to that of a client, which can claim anything.
    headers = {name: ", ".join(request.headers.getlist(name)) for name in set(request.headers)}
    if request.scope["path"] != "/ws":
        socket.reject(HTTPStatus.NOT_FOUND, "WebSockets are served at /ws")
    elif (verdict := deps.guards.check_handshake(headers)) is not None:
        limited.info("handshake refused", reason=verdict.reason, peer=_address(request), origin=_origin(request))
        socket.reject(HTTPStatus.FORBIDDEN, localize(verdict.sentence, _lang(request, deps)))
    elif (why := deps.not_ready()) is not None:
        # A load balancer then tries another node at once.
        socket.reject(HTTPStatus.SERVICE_UNAVAILABLE, f"not ready: {why}", {"Retry-After": "1"})
    elif deps.registry.is_full and "x-forwarded-for" in headers:
        # As above. Without a load balancer, the client receives NODE_FULL on the socket.
        socket.reject(HTTPStatus.SERVICE_UNAVAILABLE, "too many sockets")
    else:
        return False
    return True


def _accept_handshake(socket: SocketProtocol, deps: SessionDeps) -> Session:
    """Accept a handshake. The session keeps nothing else of it, which may be large."""
    request = socket.request
    # A plus is not a blank here: no user id has a blank, and people who type URLs do not escape the plus of an address.
    url_user = QueryParams(request.scope["query_string"].replace(b"+", b"%2B")).get(USER_ID_FIELD)
    offered = [name.strip() for name in ",".join(request.headers.getlist("sec-websocket-protocol")).split(",")]
    is_ours = SUBPROTOCOL in offered
    # A page can set no other header, so a token may stand beside our subprotocol.
    tokens = [name for name in offered if is_ours and not name.startswith("imstream.")]
    frames = FrameBuilder(_lang(request, deps), deps.settings.node)
    session = Session(
        socket=socket,
        frames=frames,
        writer=SessionWriter(socket, frames, deps.scheduler),
        warning=deps.settings.auth_warning,
        peer=_address(request),
        origin=_origin(request),
        url_user=deps.settings.user_ids.parse(url_user),
        token=tokens[0] if tokens else None,
    )
    socket.accept(SUBPROTOCOL if is_ours else None)
    if deps.registry.is_full:
        session.close(CloseCode.NODE_FULL, Code.NODE_FULL, Text.NODE_FULL)
    else:
        deps.registry.add(session)
    if url_user is not None and session.url_user is None:
        session.close(CloseCode.BAD_USER_ID, Code.SYSTEM_ERROR, Text.BAD_USER_ID)
    return session


def _lang(request: HTTPConnection, deps: SessionDeps) -> Lang:
    """The language of a handshake. Browsers cannot set the header of a WebSocket, so the URL may name it too."""
    asked = request.query_params.get("lang") or request.headers.get("accept-language")
    return choose_lang(asked, deps.settings.language)


def _address(request: HTTPConnection) -> str:
    """The address of a client for the log, and the end of those that load balancers report: each appends one."""
    host = request.client.host.removeprefix("::ffff:") if request.client else "unknown"
    forwarded = ", ".join(request.headers.getlist("x-forwarded-for"))
    return f"{sanitize(forwarded[-MAX_VALUE_LENGTH:])} by {host}" if forwarded else host


def _origin(request: HTTPConnection) -> str | None:
    """The origin of the client's page for the log; None when it names none."""
    origin = request.headers.get("origin")
    return None if origin is None else sanitize(origin)
