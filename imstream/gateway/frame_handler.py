"""What a client's frames lead to: login, messages, cancels. One conversation for each session."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, assert_never

import structlog

from imstream.clock import now_ms
from imstream.errors import StoreError, StoreFull, StoreRefused
from imstream.gateway.throttling import BYTES_A_FRAME, SECONDS_A_FRAME
from imstream.guards.guard import LoginAttempt, Reject
from imstream.logs import LIMITED
from imstream.model import ChatRequest
from imstream.reply_buffer import Cursor
from imstream.store.requests import Admitted
from imstream.texts import Text
from imstream.wire import (
    USER_ID_FIELD,
    ClientCancel,
    ClientChat,
    ClientFrame,
    ClientHeartbeat,
    ClientInit,
    CloseCode,
    Code,
    InvalidFrame,
    ResumePoint,
    parse_frame,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imstream.gateway.deps import SessionDeps
    from imstream.gateway.frames import FrameBuilder
    from imstream.gateway.session import Session
    from imstream.gateway.session_writer import SessionWriter
    from imstream.reply_buffer import ReplyBuffer

BEGIN_WAIT = 0.05
"""Seconds that a free worker has to begin an answer, before the message is marked as waiting. A mark that is not needed
would be 3 % of the CPU of a short chat."""

log = structlog.get_logger()
limited = structlog.get_logger(**LIMITED)


class FrameHandler:
    """Obeys the frames of one client, one after the other, and says what became of each."""

    __slots__ = ("_held", "_phrases", "_pump", "_services", "_session")

    def __init__(self, session: Session, pump: SessionWriter, phrases: FrameBuilder, services: SessionDeps) -> None:
        self._session = session
        self._pump = pump
        self._phrases = phrases
        self._services = services
        self._held: list[ReplyBuffer] | None = None
        """Answers that have begun since a frame is dealt with; None while there is none that matters."""

    async def take(self, text: str) -> None:
        """Obey one text frame. Whatever is wrong is said to the client."""
        began = time.thread_time()
        try:
            frame = parse_frame(text, self._services.frame_limits)
        except InvalidFrame as error:
            if error.field == USER_ID_FIELD:
                self._session.close(CloseCode.BAD_USER_ID, Text.BAD_USER_ID)
            else:
                self._pump.say(self._phrases.bad_frame(error))
            return
        finally:
            if dear := (time.thread_time() - began) // SECONDS_A_FRAME:
                self._session.charge(dear)
        message_id = getattr(frame, "message_id", None)
        try:
            await self._obey(frame)
        except StoreFull:
            log.error("redis is out of memory")  # noqa: TRY400 - the operator needs no trace
            self._pump.say(self._phrases.system(Code.BUSY, Text.BUSY, message_id=message_id, retry=True))
        except StoreError as error:
            self._say_unavailable(error, message_id)
        except Exception:  # noqa: BLE001 - it is logged
            limited.exception("frame failed", type=frame.msg_type, user=self._session.user_id, peer=self._session.peer)
            self._pump.say(self._phrases.system(Code.SYSTEM_ERROR, Text.INTERNAL, message_id=message_id))

    def follow(self, reply: ReplyBuffer) -> None:
        """Follow an answer that begins, unless its end was told; but say first what the frame at hand is answered."""
        if self._held is not None:
            self._held.append(reply)
        elif not self._pump.has_told(reply.message_id):
            self._pump.follow(Cursor(reply))

    def end(self) -> None:
        """The socket is gone: let go of its session, which holds this."""
        del self._session

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

    async def _obey(self, frame: ClientFrame) -> None:
        match frame:
            case ClientInit():
                if self._is_own(frame.user_id):
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
        services, session = self._services, self._session
        session.has_asked = True
        login = LoginAttempt(frame.user_id, frame.token or session.token, session.origin, session.peer)
        welcome = await services.guards.login(login)
        if isinstance(welcome, Reject):
            self._refuse(welcome)
            return
        if session.user_id is None and not services.registry.has_room_for(frame.user_id):
            session.close(CloseCode.TOO_MANY_CONNECTIONS, Text.TOO_MANY_SOCKETS)
            return
        session.logged_in(frame.user_id, welcome.until)
        with self._holding(*(point.message_id for point in frame.resume)):
            services.registry.log_in(session, frame.user_id)
            # The route first: then no batch falls between what is read here and what other nodes tell, and who has
            # been welcomed misses nothing that is asked from then on.
            await services.presence.arrive(session, frame.user_id)
            self._pump.say(self._phrases.welcome(welcome.remaining, services.settings.heartbeat))
            # All at once: their reads share a pipeline.
            told = await asyncio.gather(*(self._resume_or_say(point) for point in frame.resume))
            if told:
                session.charge(len(told) + sum(told) / BYTES_A_FRAME)  # as what it brings back, not as what it takes

    async def _resume_or_say(self, point: ResumePoint) -> int:
        try:
            return await self._resume(point)
        except StoreError as error:
            self._say_unavailable(error, point.message_id)
            return 0

    async def _resume(self, point: ResumePoint) -> int:
        """Follow an answer from there; how many characters of it are told at once."""
        user_id, message_id = self._known_user(), point.message_id
        reply = self._services.buffers.get(user_id, message_id)
        if not await self._services.following.catch_up(reply):
            self._pump.say(self._phrases.expired(message_id))
            return 0
        self._pump.follow(Cursor(reply, attempt=point.attempt, offset=point.offset))
        goes_on = point.attempt == reply.attempt and point.offset <= reply.offset
        return reply.offset - point.offset if goes_on else reply.offset

    async def _chat(self, frame: ClientChat) -> None:
        services, phrases = self._services, self._phrases
        asked = self._request(frame)
        user_id, message_id = asked.user_id, asked.message_id
        if services.consumer.stopping:
            self._pump.say(phrases.system(Code.UNAVAILABLE, Text.DRAINING, message_id=message_id, retry=True))
            return
        passed = await services.guards.chat(asked)
        if isinstance(passed, Reject):
            self._refuse(passed, message_id)
            return
        # Held from here on: the worker may have answered before this socket follows.
        reply = services.buffers.get(user_id, message_id)
        try:
            verdict = await services.requests.admit(passed.request)
        except (StoreFull, StoreRefused):  # by the server of the stream, which in a cluster is not that of the quota
            await passed.undo()
            raise
        if not isinstance(verdict, Admitted):
            await passed.undo()
            self._pump.say(phrases.busy(message_id, by_user=verdict.by_user))
            return
        if not (reply.has_writer or await self._is_begun_at_once(reply, verdict)):
            # Without the mark it would be answered too, but a resume or cancel on another node would not find it before
            # its turn. So it is not called accepted: sent again, it is a duplicate that is recognised.
            await services.replies.mark_queued(user_id, message_id)
        self._pump.say(phrases.accepted(message_id, verdict.position, passed.remaining))
        # From the beginning, also what this socket may have been told already when the message is sent again.
        self._pump.follow_anew(Cursor(reply))

    async def _is_begun_at_once(self, reply: ReplyBuffer, admitted: Admitted) -> bool:
        """Whether a worker that is free begins the answer: that is recorded, and needs no other mark."""
        return admitted.position <= self._services.jobs.free_slots and await reply.wait_until_recorded(BEGIN_WAIT)

    def _request(self, frame: ClientChat) -> ChatRequest:
        return ChatRequest(
            user_id=self._known_user(),
            message_id=frame.message_id or secrets.token_urlsafe(12),
            contents=frame.contents,
            history=tuple((turn.role, turn.content) for turn in frame.history),
            lang=self._phrases.lang,
            at=now_ms(),
            trace=f"{random.getrandbits(64):016x}",
        )

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

    def _refuse(self, verdict: Reject, message_id: str | None = None) -> None:
        frame = self._phrases.refused(verdict, message_id)
        if verdict.close is None:
            self._pump.say(frame)
        else:
            self._session.close_with(verdict.close, frame)

    def _say_unavailable(self, error: StoreError, message_id: str | None) -> None:
        limited.warning("redis away, client told UNAVAILABLE", error=str(error), peer=self._session.peer)
        self._pump.say(self._phrases.system(Code.UNAVAILABLE, Text.UNAVAILABLE, message_id=message_id, retry=True))

    def _is_logged_in(self) -> bool:
        if self._session.user_id is None:
            self._pump.say(self._phrases.system(Code.FORBIDDEN, Text.NOT_LOGGED_IN))
        return self._session.user_id is not None

    def _is_own(self, user_id: int | None, message_id: str | None = None) -> bool:
        """Whether a frame speaks for the user of this socket: of its INIT, or before that of its URL."""
        owner = self._session.url_user if self._session.user_id is None else self._session.user_id
        if user_id is None or owner is None or user_id == owner:
            return True
        self._pump.say(self._phrases.system(Code.FORBIDDEN, Text.OTHER_USER, message_id=message_id))
        return False

    def _known_user(self) -> int:
        assert self._session.user_id is not None  # noqa: S101 - checked when the frame was taken
        return self._session.user_id
