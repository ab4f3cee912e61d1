"""One socket: frames in, pump out."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, assert_never

import structlog

from imstream.errors import StoreError, StoreFull
from imstream.gateway.phrases import Phrases
from imstream.gateway.protocol import socket_of
from imstream.gateway.pump import Pump
from imstream.reply import Cursor
from imstream.store.chat_request import ChatRequest
from imstream.store.requests import Admitted
from imstream.texts import Text, choose_lang
from imstream.wire import (
    USER_ID_FIELD,
    BadFrame,
    ClientCancel,
    ClientChat,
    ClientFrame,
    ClientHeartbeat,
    ClientInit,
    Close,
    Code,
    ResumePoint,
    parse,
    parse_user_id,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.websockets import WebSocket

    from imstream.gateway.services import Services
    from imstream.reply import Reply
    from imstream.wire import ServerFrame

log = structlog.get_logger()


class Session:
    """One socket, from its handshake to its close. Times are those of the event loop, in seconds."""

    __slots__ = (
        "_held",
        "_last_words",
        "_phrases",
        "_pump",
        "_services",
        "_socket",
        "_websocket",
        "began_at",
        "closing_since",
        "heard_at",
        "login",
        "user_id",
    )

    def __init__(self, websocket: WebSocket, services: Services) -> None:
        self._websocket = websocket
        self._services = services
        # A browser cannot set the header of a WebSocket, so the address may say it too.
        lang = websocket.query_params.get("lang") or websocket.headers.get("accept-language")
        self._phrases = Phrases(choose_lang(lang), services.settings.node)
        self._socket = socket_of(websocket.scope)
        self._pump = Pump(self._socket, self._phrases, services.rounds)
        self._last_words: tuple[Close, ServerFrame] | None = None
        self._held: list[Reply] | None = None
        """Answers that have begun since a frame is dealt with; None while there is none that matters."""
        self.user_id: int | None = None
        self.login = 0
        """Number of its login: the newer of two has the higher one. 0: none is known."""
        self.began_at = self.heard_at = asyncio.get_running_loop().time()
        self.closing_since: float | None = None

    @property
    def blocked_since(self) -> float | None:
        """Since when the peer has read nothing although there is something to send; None when it reads."""
        return self._pump.blocked_since

    async def run(self) -> None:
        """Serve the socket until either side ends it."""
        await self._websocket.accept()
        self._socket.forget_handshake()
        registry = self._services.registry
        registry.add(self)
        try:
            if USER_ID_FIELD in self._websocket.query_params and self._url_user() is None:
                self.close(Close.BAD_USER_ID, Text.BAD_USER_ID)
            await self._receive()
        finally:
            registry.remove(self)
            self._pump.abandon()
            if self.user_id is not None:
                self._services.presence.left(self.user_id)

    def close(self, code: Close, text: Text) -> None:
        """Say why, and close when everything said before is sent."""
        if self.closing_since is None:
            self.closing_since = asyncio.get_running_loop().time()
            self._last_words = (code, self._phrases.system(Code.SYSTEM_ERROR, text))
            self._pump.finish(*self._last_words)

    def expel(self, code: Close, text: Text) -> None:
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

    def follow(self, reply: Reply) -> None:
        """Follow an answer that begins, unless its end was told; but say first what the frame at hand is answered."""
        if self._held is not None:
            self._held.append(reply)
        elif not self._pump.has_told(reply.message_id):
            self._pump.follow(Cursor(reply))

    @contextmanager
    def _holding(self, *known: str) -> Iterator[None]:
        """Follow only afterwards what begins meanwhile, except messages of which the client knows the beginning."""
        held = self._held = []
        try:
            yield
        finally:
            self._held = None
            for reply in held:
                if reply.message_id not in known:
                    self.follow(reply)

    async def _receive(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            if self.closing_since is not None:
                continue
            self.heard_at = loop.time()
            text = message.get("text")
            if text is None:
                self._pump.say(self._phrases.system(Code.BAD_REQUEST, Text.TEXT_ONLY))
            else:
                await self._take(text)
            await self._pump.room()

    async def _take(self, text: str) -> None:
        try:
            frame = parse(text)
        except BadFrame as error:
            if error.field == USER_ID_FIELD:
                self.close(Close.BAD_USER_ID, Text.BAD_USER_ID)
            else:
                self._pump.say(self._phrases.bad_frame(error))
            return
        message_id = getattr(frame, "message_id", None)
        try:
            await self._obey(frame)
        except StoreFull:
            log.error("redis is out of memory")  # noqa: TRY400 - the operator needs no trace
            self._pump.say(self._phrases.system(Code.BUSY, Text.BUSY, message_id=message_id, retry=True))
        except StoreError as error:
            self._say_unavailable(error, message_id)
        except Exception:
            log.exception("frame failed", type=frame.msg_type, user=self.user_id)
            self._pump.say(self._phrases.system(Code.SYSTEM_ERROR, Text.INTERNAL, message_id=message_id))

    async def _obey(self, frame: ClientFrame) -> None:
        match frame:
            case ClientInit():
                await self._init(frame)
            case ClientHeartbeat():
                if self._is_own(frame.user_id):
                    self._pump.say(self._phrases.heartbeat())
            case ClientChat():
                if self._is_logged_in() and self._is_own(frame.user_id, frame.message_id):
                    with self._holding():  # the answer may begin before it is said that the message was accepted
                        await self._chat(frame)
            case ClientCancel():
                if self._is_logged_in() and self._is_own(frame.user_id, frame.message_id):
                    await self._cancel(frame.message_id)
            case _:
                assert_never(frame)

    async def _init(self, frame: ClientInit) -> None:
        if not self._is_own(frame.user_id):
            return
        self.user_id = self._phrases.user_id = frame.user_id
        services = self._services
        with self._holding(*(point.message_id for point in frame.resume)):
            services.registry.log_in(self, frame.user_id)
            # The route first: then no batch falls between what is read here and what other nodes tell, and who has
            # been welcomed misses nothing that is asked from then on.
            await services.presence.arrive(self, frame.user_id)
            self._pump.say(self._phrases.welcome())
            # All at once: their reads share a pipeline.
            await asyncio.gather(*(self._resume_or_say(point) for point in frame.resume))

    async def _resume_or_say(self, point: ResumePoint) -> None:
        try:
            await self._resume(point)
        except StoreError as error:
            self._say_unavailable(error, point.message_id)

    async def _resume(self, point: ResumePoint) -> None:
        user_id, message_id = self._known_user(), point.message_id
        reply = self._services.board.get(user_id, message_id)
        if not await self._services.following.catch_up(reply):
            self._pump.say(self._phrases.expired(message_id))
            return
        self._pump.follow(Cursor(reply, attempt=point.attempt, offset=point.offset))

    async def _chat(self, frame: ClientChat) -> None:
        services, phrases = self._services, self._phrases
        user_id, message_id = self._known_user(), frame.message_id or secrets.token_urlsafe(12)
        if services.worker.stopping:
            self._pump.say(phrases.system(Code.UNAVAILABLE, Text.DRAINING, message_id=message_id, retry=True))
            return
        request = ChatRequest(
            user_id=user_id,
            message_id=message_id,
            contents=frame.contents,
            history=tuple((turn.role, turn.content) for turn in frame.history),
            lang=phrases.lang,
            at=time.time_ns() // 1_000_000,
            trace=f"{random.getrandbits(64):016x}",
        )
        # Held from here on: the worker may have answered before this socket follows.
        reply = services.board.get(user_id, message_id)
        verdict = await services.requests.admit(request)
        if not isinstance(verdict, Admitted):
            self._pump.say(phrases.busy(message_id, by_user=verdict.by_user))
            return
        if not reply.live:
            # Without the mark it would be answered too, but a resume or cancel on another node would not find it before
            # its turn. So it is not called accepted: sent again, it is a duplicate that is recognised.
            await services.replies.mark_queued(user_id, message_id)
        self._pump.say(phrases.accepted(message_id, verdict.position))
        # From the beginning, also what this socket may have been told already when the message is sent again.
        self._pump.follow_anew(Cursor(reply))

    async def _cancel(self, message_id: str) -> None:
        followed = message_id in self._pump.followed
        match await self._services.jobs.cancel(self._known_user(), message_id):
            case "cancelled":
                if not followed:
                    self._pump.say(self._phrases.cancelled(message_id))
            case "too_late":
                self._pump.say(self._phrases.system(Code.TOO_LATE, Text.TOO_LATE, message_id=message_id))
            case "unknown":
                self._pump.say(self._phrases.system(Code.UNKNOWN, Text.UNKNOWN_MESSAGE, message_id=message_id))

    def _say_unavailable(self, error: StoreError, message_id: str | None) -> None:
        log.warning("redis away, client told UNAVAILABLE", error=str(error))
        self._pump.say(self._phrases.system(Code.UNAVAILABLE, Text.UNAVAILABLE, message_id=message_id, retry=True))

    def _is_logged_in(self) -> bool:
        if self.user_id is None:
            self._pump.say(self._phrases.system(Code.FORBIDDEN, Text.NOT_LOGGED_IN))
        return self.user_id is not None

    def _is_own(self, user_id: int | None, message_id: str | None = None) -> bool:
        """Whether a frame speaks for the user of this socket: of its INIT, or before that of its URL."""
        owner = self._url_user() if self.user_id is None else self.user_id
        if user_id is None or owner is None or user_id == owner:
            return True
        self._pump.say(self._phrases.system(Code.FORBIDDEN, Text.OTHER_USER, message_id=message_id))
        return False

    def _url_user(self) -> int | None:
        return parse_user_id(self._websocket.query_params.get(USER_ID_FIELD))

    def _known_user(self) -> int:
        assert self.user_id is not None  # noqa: S101 - checked when the frame was taken
        return self.user_id
