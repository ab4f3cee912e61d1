"""One socket, from its handshake to its close: frames in, pump out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from math import ceil

import structlog
from starlette.datastructures import QueryParams
from starlette.requests import HTTPConnection
from starlette.types import Scope
from starlette.websockets import WebSocket

from imstream.gateway.deps import SessionDeps
from imstream.gateway.frame_handler import FrameHandler
from imstream.gateway.frames import FrameBuilder
from imstream.gateway.session_writer import SessionWriter
from imstream.gateway.websocket_protocol import socket_of
from imstream.guards.guard import Reject
from imstream.logs import MAX_VALUE_LENGTH, sanitize
from imstream.reply_buffer import ReplyBuffer
from imstream.texts import Lang, Text, choose_lang
from imstream.wire import SUBPROTOCOL, USER_ID_FIELD, CloseCode, Code, ServerFrame, parse_user_id

log = structlog.get_logger()

_NO_CODE = 1005
"""The peer has gone without a word, or named no code (RFC 6455, section 7.4.1)."""


def query_of(scope: Scope) -> QueryParams:
    """The parameters of the address. Starlette would keep them as long as the socket, and they may be thousands."""
    return QueryParams(scope["query_string"])


def asked_lang(websocket: WebSocket) -> Lang:
    """The language of a handshake. A browser cannot set the header of a WebSocket, so the address may say it too."""
    return choose_lang(query_of(websocket.scope).get("lang") or websocket.headers.get("accept-language"))


def peer_of(connection: HTTPConnection) -> str:
    """Who is at the other end, for the log: its address, and for whom a load balancer says that it came.

    Of a long list the end is kept: each proxy appends the address that it has seen.
    """
    host = connection.client.host.removeprefix("::ffff:") if connection.client else "unknown"
    forwarded = ", ".join(connection.headers.getlist("x-forwarded-for"))
    return f"{sanitize(forwarded[-MAX_VALUE_LENGTH:])} by {host}" if forwarded else host


def origin_of(connection: HTTPConnection) -> str | None:
    """The origin of the page at the other end, as the log shows it; None when it names none."""
    origin = connection.headers.get("origin")
    return None if origin is None else sanitize(origin)


def offered_token(subprotocols: Sequence[str]) -> str | None:
    """The token that a handshake names beside our protocol: a page can set no header but this one."""
    if SUBPROTOCOL not in subprotocols:
        return None
    return next((name for name in subprotocols if not name.startswith("imstream.")), None)


class Session:
    """One socket. Times are those of the event loop, in seconds."""

    __slots__ = (
        "_conversation",
        "_last_words",
        "_names_nobody",
        "_phrases",
        "_pump",
        "_services",
        "_slowed",
        "_socket",
        "_websocket",
        "began_at",
        "closing_since",
        "ends_at",
        "has_asked",
        "heard_at",
        "login",
        "origin",
        "peer",
        "token",
        "url_user",
        "user_id",
        "warn_at",
    )

    def __init__(self, websocket: WebSocket, services: SessionDeps) -> None:
        self._websocket = websocket
        self._services = services
        self._phrases = FrameBuilder(asked_lang(websocket), services.settings.node)
        self._socket = socket_of(websocket.scope)
        self._pump = SessionWriter(self._socket, self._phrases, services.rounds)
        self._last_words: tuple[CloseCode, ServerFrame] | None = None
        self._socket.on_rest(self._say_slow_down)
        self.peer = peer_of(websocket)
        """Its address, for the log."""
        self.origin = origin_of(websocket)
        self._slowed = 0
        """How often it was told to slow down."""
        self._conversation = FrameHandler(self, self._pump, self._phrases, services)
        named = query_of(websocket.scope).get(USER_ID_FIELD)
        self.url_user = parse_user_id(named)
        """The user that the address names; None when it names none."""
        self._names_nobody = named is not None and self.url_user is None
        self.user_id: int | None = None
        """Who has logged in."""
        self.has_asked = False
        """Whether it has asked to be logged in. If nobody is, that is not the fault of who did."""
        self.login = 0
        """Number of its login: the newer of two has the higher one. 0: none is known."""
        self.began_at = self.heard_at = asyncio.get_running_loop().time()
        self.closing_since: float | None = None
        self.token = offered_token(websocket.scope["subprotocols"])
        """What the handshake shows of who this is, if INIT shows nothing."""
        self.ends_at: float | None = None
        """When the login ends; None: with the socket."""
        self.warn_at: float | None = None
        """When the client is told that it will; None when it was."""

    @property
    def blocked_since(self) -> float | None:
        """Since when the peer has read nothing although there is something to send; None when it reads."""
        return self._pump.blocked_since

    async def run(self) -> None:
        """Serve the socket until either side ends it."""
        registry, offered = self._services.registry, self._websocket.scope["subprotocols"]
        try:
            await self._websocket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
            self._socket.forget_handshake()
            if registry.is_full:
                self.close(CloseCode.NODE_FULL, Text.NODE_FULL)
            else:
                registry.add(self)
            if self._names_nobody:
                self.close(CloseCode.BAD_USER_ID, Text.BAD_USER_ID)
            code = await self._receive()
        finally:
            registry.remove(self)
            self._pump.abandon()
            self._socket.on_rest(None)
            self._conversation.end()
            if self.user_id is not None:
                self._services.presence.left(self.user_id)
        self._note_end(code)

    def logged_in(self, user_id: int, until: float | None) -> None:
        """Somebody has shown who they are, until a time in seconds since 1970. May be repeated, to go on longer."""
        if self.user_id is None:
            log.info("session opened", user=user_id, peer=self.peer, origin=self.origin)
            self._socket.trust()
        self.user_id = self._phrases.user_id = user_id
        self.ends_at = self.warn_at = None
        if until is not None:
            left = until - time.time()
            self.ends_at = asyncio.get_running_loop().time() + left  # whatever becomes of the clock
            # A short login is not followed by a warning at once, or its client would do nothing but log in.
            self.warn_at = self.ends_at - min(self._services.settings.auth_warning.total_seconds(), left / 2)

    def warn(self) -> None:
        """Say that the login will end, so that the client may log in again."""
        if self.ends_at is not None:
            self.warn_at = None
            seconds = max(0, ceil(self.ends_at - asyncio.get_running_loop().time()))
            self._pump.say(self._phrases.system(Code.UNAUTHORIZED, Text.LOGIN_ENDING, seconds=seconds))

    def close(self, code: CloseCode, text: Text, kind: Code = Code.SYSTEM_ERROR) -> None:
        """Say why, and close when everything said before is sent."""
        self.close_with(code, self._phrases.system(kind, text))

    def close_with(self, code: CloseCode, last_words: ServerFrame) -> None:
        """Close with these words when everything said before is sent."""
        if self.closing_since is None:
            self.closing_since = asyncio.get_running_loop().time()
            self._last_words = (code, last_words)
            self._pump.finish(*self._last_words)

    def refuse(self, verdict: Reject) -> None:
        """Say why the user may not stay, and close."""
        self.close_with(verdict.close or CloseCode.LOCKED, self._phrases.refused(verdict))

    def expel(self, code: CloseCode, text: Text) -> None:
        """Say why and close, without waiting for a peer that does not read."""
        self.close(code, text)
        if self._last_words is not None:
            code, frame = self._last_words
            self._socket.end(code, frame.encode())

    def is_idle(self) -> bool:
        """Whether no answer is being made here that this socket waits for."""
        jobs = self._services.jobs
        return self.user_id is None or not any(
            jobs.is_working_on(self.user_id, message_id) for message_id in self._pump.followed
        )

    def charge(self, frames: float) -> None:
        """See `Socket`."""
        self._socket.charge(frames)

    def follow(self, reply: ReplyBuffer) -> None:
        """Follow an answer that begins."""
        self._conversation.follow(reply)

    def _say_slow_down(self, rest: float) -> None:
        self._slowed += 1
        if self.closing_since is None:
            self._pump.say(self._phrases.slow_down(rest))

    def _note_end(self, code: int) -> None:
        """Log the end of the socket; quietly if nobody has logged in, or strangers could fill the log."""
        note = log.debug if self.user_id is None else log.info
        seconds = round(asyncio.get_running_loop().time() - self.began_at, 1)
        note("session closed", user=self.user_id, peer=self.peer, code=code, seconds=seconds, slowed=self._slowed)

    async def _receive(self) -> int:
        """Take frames until the socket has closed; with which code."""
        loop = asyncio.get_running_loop()
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                return int(message.get("code") or _NO_CODE)
            if self.closing_since is not None:
                continue
            self.heard_at = loop.time()
            text = message.get("text")
            if text is None:
                self._pump.say(self._phrases.system(Code.BAD_REQUEST, Text.TEXT_ONLY))
            else:
                await self._conversation.take(text)
            await self._pump.room()
