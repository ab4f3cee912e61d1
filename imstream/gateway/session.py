"""The state of one socket: what its handshake said, who has logged in, and how it ends."""

from __future__ import annotations

import asyncio
import time
from math import ceil

import structlog
from starlette.requests import HTTPConnection

from imstream.gateway.flush_scheduler import FlushScheduler
from imstream.gateway.frames import FrameBuilder
from imstream.gateway.session_writer import SessionWriter
from imstream.gateway.websocket_protocol import SocketProtocol
from imstream.guards.guard import Reject
from imstream.logs import MAX_VALUE_LENGTH, sanitize
from imstream.settings import Settings
from imstream.texts import Lang, Text, choose_lang
from imstream.wire import SUBPROTOCOL, USER_ID_FIELD, CloseCode, Code, ServerFrame, parse_user_id

log = structlog.get_logger()


def client_lang(request: HTTPConnection) -> Lang:
    """The language of a handshake. Browsers cannot set the header of a WebSocket, so the URL may name it too."""
    return choose_lang(request.query_params.get("lang") or request.headers.get("accept-language"))


def client_address(request: HTTPConnection) -> str:
    """The address of a client for the log: its own, and those that load balancers report.

    Of a long list the end is kept: each proxy appends the address that it has seen.
    """
    host = request.client.host.removeprefix("::ffff:") if request.client else "unknown"
    forwarded = ", ".join(request.headers.getlist("x-forwarded-for"))
    return f"{sanitize(forwarded[-MAX_VALUE_LENGTH:])} by {host}" if forwarded else host


def client_origin(request: HTTPConnection) -> str | None:
    """The origin of the client's page for the log; None when it names none."""
    origin = request.headers.get("origin")
    return None if origin is None else sanitize(origin)


def offered_subprotocols(request: HTTPConnection) -> list[str]:
    """The subprotocols of a handshake, our own and perhaps a token: a page can set no other header."""
    offered = ",".join(request.headers.getlist("sec-websocket-protocol"))
    return [name.strip() for name in offered.split(",")]


class Session:
    """One socket. Times are those of the event loop, in seconds."""

    __slots__ = (
        "_last_frame",
        "_settings",
        "_socket",
        "began_at",
        "closing_since",
        "ends_at",
        "frames",
        "has_asked",
        "heard_at",
        "login",
        "origin",
        "peer",
        "throttled",
        "token",
        "url_user",
        "user_id",
        "warn_at",
        "writer",
    )

    def __init__(self, socket: SocketProtocol, settings: Settings, scheduler: FlushScheduler) -> None:
        request = socket.request
        self._socket = socket
        self._settings = settings
        self._last_frame: tuple[CloseCode, ServerFrame] | None = None
        self.frames = FrameBuilder(client_lang(request), settings.node)
        self.writer = SessionWriter(socket, self.frames, scheduler)
        self.peer = client_address(request)
        self.origin = client_origin(request)
        self.url_user = parse_user_id(request.query_params.get(USER_ID_FIELD))
        """The user that the URL names; None when it names none."""
        self.token = _offered_token(offered_subprotocols(request))
        """Authenticates the user if INIT has no token."""
        self.user_id: int | None = None
        """The user who has logged in."""
        self.has_asked = False
        """Whether an INIT was received. If it could not be checked in time, the client may come back later."""
        self.login = 0
        """Number of the login: of two, the newer one has the higher number. 0: not known."""
        self.throttled = 0
        """How often the client was told that it is throttled."""
        self.began_at = self.heard_at = asyncio.get_running_loop().time()
        self.closing_since: float | None = None
        self.ends_at: float | None = None
        """When the login expires; None: with the socket."""
        self.warn_at: float | None = None
        """When the client is warned of that; None when it was."""
        socket.on_throttle = self._on_throttle

    @property
    def blocked_since(self) -> float | None:
        """Since when the peer has read nothing although there is something to send; None while it reads."""
        return self.writer.blocked_since

    def logged_in(self, user_id: int, until: float | None) -> None:
        """Note a login, until a time in seconds since 1970. It may be repeated to extend it."""
        if self.user_id is None:
            log.info("session opened", user=user_id, peer=self.peer, origin=self.origin)
            self._socket.trust()
        self.user_id = self.frames.user_id = user_id
        self.ends_at = self.warn_at = None
        if until is not None:
            rest = until - time.time()
            self.ends_at = asyncio.get_running_loop().time() + rest  # the wall clock may be changed meanwhile
            # After a short login, a warning at once would make the client do nothing but log in.
            self.warn_at = self.ends_at - min(self._settings.auth_warning.total_seconds(), rest / 2)

    def warn(self) -> None:
        """Tell the client that its login expires soon, so that it may log in again."""
        if self.ends_at is not None:
            self.warn_at = None
            seconds = max(0, ceil(self.ends_at - asyncio.get_running_loop().time()))
            self.writer.send(self.frames.system(Code.UNAUTHORIZED, Text.LOGIN_ENDING, seconds=seconds))

    def charge(self, frames: float) -> None:
        """Count so many frames towards the rate of the socket."""
        self._socket.charge(frames)

    def close(self, code: CloseCode, text: Text, kind: Code = Code.SYSTEM_ERROR) -> None:
        """Close with a sentence, when everything before it was sent."""
        self._close(code, self.frames.system(kind, text))

    def close_rejected(self, verdict: Reject, message_id: str | None = None) -> None:
        """Close with the sentence of a guard."""
        self._close(verdict.close or CloseCode.LOCKED, self.frames.rejected(verdict, message_id))

    def _close(self, code: CloseCode, last_frame: ServerFrame) -> None:
        if self.closing_since is None:
            self.closing_since = asyncio.get_running_loop().time()
            self._last_frame = (code, last_frame)
            self.writer.close(code, last_frame)

    def expel(self, code: CloseCode, text: Text) -> None:
        """Close with a sentence, without waiting for a peer that does not read."""
        self.close(code, text)
        if self._last_frame is not None:
            code, frame = self._last_frame
            self._socket.end(code, frame.encode())

    def stop(self) -> None:
        """Release the socket, which is gone."""
        self.writer.stop()
        self._socket.on_throttle = None

    def _on_throttle(self, seconds: float) -> None:
        self.throttled += 1
        if self.closing_since is None:
            self.writer.send(self.frames.throttled(seconds))


def _offered_token(subprotocols: list[str]) -> str | None:
    """The token beside our own subprotocol."""
    if SUBPROTOCOL not in subprotocols:
        return None
    return next((name for name in subprotocols if not name.startswith("imstream.")), None)
