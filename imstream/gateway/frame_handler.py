"""Handles the frames of a client: login and resume, messages, cancels, heartbeats."""

import asyncio
import secrets
import time
from typing import assert_never

import structlog

from imstream import wire
from imstream.codes import CloseCode, Code, State, Want
from imstream.errors import StoreError, StoreFull, StoreRefused
from imstream.frame_parser import InvalidFrame, parse_frame
from imstream.gateway.busy_log import LOAD
from imstream.gateway.cursor import Cursor
from imstream.gateway.session import Session
from imstream.gateway.session_deps import SessionDeps
from imstream.gateway.websocket_protocol import BYTES_PER_FRAME, SECONDS_PER_FRAME
from imstream.guards.guard import LoginAttempt, Reject
from imstream.logs import LIMITED
from imstream.metrics import Admission
from imstream.model import ChatRequest, digest_of
from imstream.reply_buffer import ReplyBuffer
from imstream.store.inbox import MessageQueued
from imstream.store.requests import Admitted
from imstream.texts import Text
from imstream.user_ids import UserId
from imstream.wire import USER_ID_FIELD, ClientFrame

OPEN_WAIT = 0.05
"""Seconds to wait for a free worker to open the reply, before the message is marked as queued. A needless mark would be
3 % of the CPU of a short chat."""

TAKEN_WAIT = 1.0
"""The same once a worker has taken the message. Under full load it is opened later than after `OPEN_WAIT`, and a mark
would be one more script."""

CHEAP_FRAME = 1024
"""Characters of a frame that cannot take as long as `SECONDS_PER_FRAME`: to measure it takes two system calls."""

_STATES = {"queued": State.QUEUED, "done": State.DONE, "failed": State.FAILED, "cancelled": State.CANCELLED}
"""The state of a message by the last event of its record; after any other, its answer has begun."""

log = structlog.get_logger()
limited = structlog.get_logger(**LIMITED)


class FrameHandler:
    """Handles the frames of one session, one after the other, and sends the answer to each."""

    __slots__ = ("_deps", "_frames", "_session", "_writer")

    def __init__(self, session: Session, deps: SessionDeps) -> None:
        self._session = session
        self._frames = session.frames
        self._writer = session.writer
        self._deps = deps

    async def handle(self, text: str) -> None:
        """Handle one text frame. Every error is answered."""
        if (frame := self._parse(text)) is None:
            return
        message_id = getattr(frame, "message_id", None)
        if message_id is None and isinstance(frame, wire.ClientChat):  # repeated below, it is still the same message
            frame = frame.model_copy(update={"message_id": secrets.token_urlsafe(12)})
        for is_repeated in (False, True):
            try:
                if self._is_allowed(frame, message_id):
                    await self._dispatch(frame)
                elif isinstance(frame, wire.ClientChat):
                    self._deps.metrics.admissions["refused"] += 1
            except StoreFull:
                # Dead letters are dropped before a living message is refused (I9).
                if not is_repeated and await self._deps.dead_letters.make_room():
                    continue
                self._send_full(frame, message_id)
            except StoreError as error:
                self._send_unavailable(error, message_id)
            except Exception:  # noqa: BLE001 - it is logged
                who = {"user": self._session.user_id, "peer": self._session.peer}
                limited.exception("frame failed", type=frame.msg_type, **who)
                self._send_error(Code.SYSTEM_ERROR, Text.INTERNAL, message_id)
            return

    def _parse(self, text: str) -> ClientFrame | None:
        """Parse a frame, or answer the error."""
        is_long = len(text) > CHEAP_FRAME
        began = time.thread_time() if is_long else 0.0
        try:
            return parse_frame(text, self._deps.frame_limits, self._deps.settings.user_ids)
        except InvalidFrame as error:
            if error.field == USER_ID_FIELD:
                self._session.close(CloseCode.BAD_USER_ID, Code.SYSTEM_ERROR, Text.BAD_USER_ID)
            else:
                self._writer.send(self._frames.bad_frame(error))
            return None
        finally:
            if is_long and (cost := (time.thread_time() - began) // SECONDS_PER_FRAME):
                self._session.socket.charge(cost)

    async def _dispatch(self, frame: ClientFrame) -> None:
        match frame:
            case wire.ClientInit():
                await self._init(frame)
            case wire.ClientHeartbeat():
                self._writer.send(self._frames.heartbeat())
            case wire.ClientChat():
                assert frame.message_id is not None  # noqa: S101 - given by `handle`
                deps, message_id = self._deps, frame.message_id
                result: Admission | None = "unavailable"
                try:
                    receiving = deps.tracing.receive(frame.traceparent, deps.requests.key, message_id)
                    # The reply may begin before the message is answered as accepted.
                    with self._writer.hold_new(), receiving as span:
                        result = await self._chat(frame, message_id, span.traceparent)
                        span.note(result)
                except StoreFull:
                    result = None  # `handle` repeats it, or counts it
                    raise
                finally:
                    if result is not None:
                        self._count(result)
            case wire.ClientCancel():
                await self._cancel(frame.message_id)
            case _:
                assert_never(frame)

    def _count(self, result: Admission) -> None:
        self._deps.metrics.admissions[result] += 1
        if result in LOAD:
            self._deps.busy_log.count(result, self._user_id())

    def _is_allowed(self, frame: ClientFrame, message_id: str | None) -> bool:
        """Whether a frame is for the user of this socket: that of its INIT, or before that of its URL."""
        owner = self._session.url_user if self._session.user_id is None else self._session.user_id
        if self._session.user_id is None and isinstance(frame, wire.ClientChat | wire.ClientCancel):
            self._send_error(Code.FORBIDDEN, Text.NOT_LOGGED_IN)
        elif owner is not None and frame.user_id not in {None, owner}:
            self._send_error(Code.FORBIDDEN, Text.OTHER_USER, message_id)
        else:
            return True
        return False

    async def _init(self, frame: wire.ClientInit) -> None:
        deps, session, user_id = self._deps, self._session, frame.user_id
        session.has_asked = True
        verdict = await deps.guards.check_login(
            LoginAttempt(user_id, frame.token or session.token, session.origin, session.peer)
        )
        if isinstance(verdict, Reject):
            self._reject(verdict)
            return
        if session.user_id is None and not deps.registry.has_room_for(user_id):
            session.close(CloseCode.TOO_MANY_SOCKETS, Code.TOO_MANY_SOCKETS, Text.TOO_MANY_SOCKETS)
            return
        session.logged_in(user_id, verdict.expires_at)
        wants = frozenset(Want).intersection(frame.wants)
        self._writer.set_wants(wants if deps.settings.thinking == "show" else wants - {Want.THINKING})
        with self._writer.hold_new(*(point.message_id for point in frame.resume)):
            deps.registry.log_in(session, user_id)
            # The route first: then no batch falls between this read and the notices of other nodes, and a
            # client that has its welcome misses no reply that begins from then on.
            await deps.presence.on_login(session, user_id)
            messages = await self._messages(user_id) if Want.ASKED in self._writer.wants else None
            self._writer.send(self._frames.welcome(verdict.remaining, deps.settings.heartbeat, messages))
            session.socket.charge(len(frame.resume))  # each is read in Redis, and what is found is sent
            # All at once: their reads share a pipeline.
            sizes = await asyncio.gather(*(self._resume(user_id, point) for point in frame.resume))
            session.socket.charge(sum(sizes) / BYTES_PER_FRAME)

    async def _messages(self, user_id: UserId) -> dict[str, State]:
        """The user's messages that can be resumed, with their states."""
        messages = await self._deps.replies.messages(user_id)
        self._session.socket.charge(len(messages))  # each is read in Redis
        return {message_id: _STATES.get(event, State.STARTED) for message_id, event in messages.items()}

    async def _resume(self, user_id: UserId, point: wire.ResumePoint) -> int:
        """Follow a reply from a point; how many characters of it are sent at once."""
        reply = self._deps.buffers.get(user_id, point.message_id)
        try:
            found = await self._deps.reply_sync.catch_up(reply)
        except StoreError as error:
            self._send_unavailable(error, point.message_id)
            return 0
        except Exception:  # noqa: BLE001 - it is logged; a record edited by hand must not end the others
            limited.exception("record cannot be read", user=user_id, message_id=point.message_id)
            self._send_error(Code.SYSTEM_ERROR, Text.INTERNAL, point.message_id)
            return 0
        if not found:
            self._writer.send(self._frames.expired(point.message_id))
            return 0
        wants = self._writer.wants - ({Want.ASKED} if point.attempt > 0 else set())
        cursor = Cursor(reply, attempt=point.attempt, offset=point.offset, wants=wants)
        size = cursor.size
        self._writer.follow(cursor)
        return size

    async def _chat(self, frame: wire.ClientChat, message_id: str, traceparent: str) -> Admission:
        deps, user_id = self._deps, self._user_id()
        request = ChatRequest(
            user_id=user_id,
            message_id=message_id,
            contents=frame.contents,
            history=tuple((turn.role, turn.content) for turn in frame.history),
            lang=self._frames.lang,
            at=deps.metrics.redis_clock.at(self._session.socket.received_at),
            traceparent=traceparent,
            digest=digest_of(frame.contents),
        )
        if deps.consumer.stopping:
            self._send_error(Code.UNAVAILABLE, Text.DRAINING, message_id, retry=True)
            return "unavailable"
        if (pause := deps.pauses.own) and pause.refuses:
            self._send_error(Code.BUSY, Text.PAUSED, message_id, retry=True)
            return "busy"
        verdict = await deps.guards.check_chat(request, peer=self._session.peer)
        if isinstance(verdict, Reject):
            self._reject(verdict, message_id)
            return _admission_of(verdict)
        # Kept alive from here on: the worker may have written the reply before this socket follows it.
        reply = deps.buffers.get(user_id, message_id)
        try:
            admission = await deps.consumer.admit(verdict.request)
        except (StoreFull, StoreRefused):  # in a cluster, another server may have counted the quota
            await verdict.undo()
            raise
        if not isinstance(admission, Admitted):
            await verdict.undo()
            self._writer.send(self._frames.busy(message_id, by_user=admission.by_user))
            return "user_busy" if admission.by_user else "busy"
        await self._ensure_record(verdict.request, reply, admission)
        if reply.question is not None and reply.question.differs_from(request.digest):
            await verdict.undo()
            problem = InvalidFrame("messageId", "it belongs to a message with another text", message_id)
            self._writer.send(self._frames.bad_frame(problem))
            return "refused"
        position = admission.position if reply.terminal is None else None
        self._writer.send(self._frames.accepted(message_id, position, verdict.remaining))
        # From the beginning, also if this socket has received some of it and the message was sent again: that costs as
        # much as a resume.
        cursor = Cursor(reply, wants=self._writer.wants - {Want.ASKED})
        if size := cursor.size:
            self._session.socket.charge(size / BYTES_PER_FRAME)
        self._writer.follow(cursor, restart=True)
        return "accepted"

    async def _ensure_record(self, request: ChatRequest, reply: ReplyBuffer, admission: Admitted) -> None:
        """Wait until there is a record of the message, ours or that of an earlier one with its id."""
        deps = self._deps
        # A free worker opens the reply at once, which needs no other record.
        is_free = deps.jobs.line.reason is None and admission.position <= deps.jobs.free_slots
        if reply.has_writer or (is_free and await reply.wait_until_recorded(OPEN_WAIT)):
            return
        if reply.has_job and await reply.wait_until_recorded(TAKEN_WAIT):
            return
        # Without a record, a resume or cancel on another node would not find the message before its turn. It is
        # not called accepted then: sent again, it is recognised as a duplicate.
        request_id = deps.requests.request_id(admission.entry_id)
        nodes = await deps.replies.mark_queued(
            request.user_id, request.message_id, request.question, request=request_id
        )
        if nodes is None:
            await deps.reply_sync.catch_up(reply)
            return
        if not reply.has_writer:
            reply.is_watched |= Want.STATUS in self._writer.wants
            reply.queue(request.question)
            deps.jobs.line.join(admission.entry_id, reply, admission.position)
        deps.registry.follow_queued(reply)
        await deps.inbox.notify(nodes, MessageQueued(request.user_id, request.message_id))

    async def _cancel(self, message_id: str) -> None:
        followed = message_id in self._writer.followed
        match await self._deps.jobs.cancel(self._user_id(), message_id):
            case "cancelled":
                if not followed:
                    self._writer.send(self._frames.cancelled(message_id))
            case "too_late":
                self._send_error(Code.TOO_LATE, Text.TOO_LATE, message_id)
            case "unknown":
                self._send_error(Code.UNKNOWN, Text.UNKNOWN_MESSAGE, message_id)

    def _user_id(self) -> UserId:
        assert self._session.user_id is not None  # noqa: S101 - checked by `_dispatch`
        return self._session.user_id

    def _reject(self, verdict: Reject, message_id: str | None = None) -> None:
        if verdict.close is None:
            self._writer.send(self._frames.rejected(verdict, message_id))
        else:
            self._session.close_rejected(verdict, message_id)

    def _send_full(self, frame: ClientFrame, message_id: str | None) -> None:
        if isinstance(frame, wire.ClientChat):
            self._count("busy")
        limited.error("redis is out of memory")
        self._send_error(Code.BUSY, Text.BUSY, message_id, retry=True)

    def _send_unavailable(self, error: StoreError, message_id: str | None) -> None:
        limited.warning("redis not available, client told UNAVAILABLE", error=str(error), peer=self._session.peer)
        self._send_error(Code.UNAVAILABLE, Text.UNAVAILABLE, message_id, retry=True)

    def _send_error(self, code: Code, text: Text, message_id: str | None = None, *, retry: bool = False) -> None:
        self._writer.send(self._frames.system(code, text, message_id=message_id, retry=retry))


def _admission_of(verdict: Reject) -> Admission:
    match verdict.code:
        case Code.RATE_LIMITED:
            return "quota" if verdict.reason == "quota" else "rate_limited"
        case Code.UNAVAILABLE:
            return "unavailable"
    return "refused"
