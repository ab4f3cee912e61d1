"""The session writer: the one sender of a socket. Back-pressure and coalescing are all here.

It has one cursor for each reply that the socket follows. Whenever the socket takes a frame, the next one holds all text
that is new by then: a fast socket gets each piece as it comes, a slow one fewer and larger ones, and no other waits.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog

from imstream.codes import CloseCode, Code, Want
from imstream.gateway.cursor import Cursor, ReplyEnded
from imstream.gateway.flush_scheduler import FlushScheduler
from imstream.gateway.frames import FrameBuilder
from imstream.gateway.websocket_protocol import SocketProtocol
from imstream.reply_buffer import ReplyBuffer
from imstream.texts import Text
from imstream.wire import ServerFrame

log = structlog.get_logger()

MAX_BATCH = 16
"""Maximum frames in one write."""

MAX_BATCH_SIZE = 65_536
"""Characters from which on no frame is added to a write: the memory of a stalled socket besides its replies."""

MAX_SENT_ENDS = 32
"""Maximum ends of replies that are remembered as sent: the notice that a reply begins may come after the reply itself,
when the node was frozen or could not read its inbox."""

MAX_OUTBOX = 32
"""Maximum frames that wait for the socket; then nothing more is read from it until it takes one."""


@dataclass(slots=True, eq=False, repr=False)
class SessionWriter:
    """Sends frames to one socket, and the new text of the replies that it follows."""

    _socket: SocketProtocol
    _frames: FrameBuilder
    _scheduler: FlushScheduler
    wants: frozenset[str] = frozenset()
    """The optional frames that the client wants."""
    blocked_since: float | None = None
    """Loop time since when the socket has taken nothing although there is something to send."""
    _outbox: list[ServerFrame] = field(default_factory=list)
    _outbox_taken: asyncio.Event | None = None
    _cursors: dict[str, Cursor] = field(default_factory=dict)
    _grown: dict[str, None] = field(default_factory=dict)
    _sent_ends: dict[str, int] = field(default_factory=dict)
    """The attempts at whose end they were."""
    _held: list[ReplyBuffer] | None = None
    _scheduled: bool = False
    _is_urgent: bool = False
    """Whether the scheduled flush is in the next turn of the event loop."""
    _stopped: bool = False
    _closing: tuple[CloseCode, ServerFrame] | None = None

    def __post_init__(self) -> None:
        self._socket.on_writable = self._schedule

    @property
    def followed(self) -> list[str]:
        """Ids of the messages whose end was not sent yet."""
        return list(self._cursors)

    def follows(self, message_id: str) -> bool:
        """Whether the end of a message was not sent yet."""
        return message_id in self._cursors

    @property
    def is_slow(self) -> bool:
        """Whether the socket does not accept data."""
        return self.blocked_since is not None or len(self._outbox) >= MAX_OUTBOX

    def set_wants(self, wants: frozenset[str]) -> None:
        """Send these optional frames from now on. Of a reply that is followed already, the question is not sent."""
        if wants == self.wants:
            return
        self.wants = wants
        for cursor in self._cursors.values():
            cursor.wants = (cursor.wants & wants) | (wants - {Want.ASKED})
            self._watch(cursor)
            self._on_growth(cursor.reply)

    def _watch(self, cursor: Cursor) -> None:
        cursor.reply.is_watched |= Want.STATUS in cursor.wants or Want.THINKING in cursor.wants

    def send(self, frame: ServerFrame) -> None:
        """Queue a frame; it is sent before the new text of replies."""
        self._outbox.append(frame)
        self._schedule(urgent=True)

    async def drain(self) -> None:
        """Wait until there is room in the outbox: a peer that does not read is not read from."""
        while len(self._outbox) >= MAX_OUTBOX and not self._stopped:
            self._outbox_taken = asyncio.Event()
            await self._outbox_taken.wait()

    def follow(self, cursor: Cursor, *, restart: bool = False) -> None:
        """Send the new text of a reply, until its end. A reply that is followed keeps its cursor, unless `restart`."""
        if self._stopped:
            return
        message_id = cursor.reply.message_id
        if restart or message_id not in self._cursors:
            cursor.reply.subscribe(self._on_growth)
            self._cursors[message_id] = cursor
            self._watch(cursor)
        self._on_growth(cursor.reply)

    def follow_new(self, reply: ReplyBuffer) -> None:
        """Follow a reply that begins, unless its end was sent. While replies are held, do so afterwards.

        A reply may continue after its end, when an operator retries it: then it begins with a `restart`.
        """
        ended_at = self._sent_ends.get(reply.message_id)
        if self._held is not None:
            self._held.append(reply)
        elif ended_at is None or ended_at < reply.fence:
            wants = self.wants if ended_at is None else self.wants - {Want.ASKED}
            self.follow(Cursor(reply, attempt=int(reply.fence > 1), wants=wants))

    @contextmanager
    def hold_new(self, *known: str) -> Iterator[None]:
        """Hold replies that begin until the frame is answered. Those to `known` messages are followed by then."""
        held = self._held = []
        try:
            yield
        finally:
            self._held = None
            for reply in held:
                if reply.message_id not in known:
                    self.follow_new(reply)

    def close(self, code: CloseCode, last_frame: ServerFrame) -> None:
        """Close the socket with this frame when everything that is known was sent."""
        self._closing = (code, last_frame)
        self._schedule(urgent=True)

    def close_now(self) -> None:
        """Close the socket with the frame of `close`, without unsent data."""
        if self._closing is not None:
            (code, frame), self._closing = self._closing, None
            self._socket.end(code, frame.encode())

    def stop(self) -> None:
        """Stop following replies and release `drain`: the socket is gone."""
        self._stopped = True
        self._notify_drain()
        for cursor in self._cursors.values():
            cursor.reply.unsubscribe(self._on_growth)
        self._cursors.clear()
        self._grown.clear()
        self._socket.on_writable = None

    def _notify_drain(self) -> None:
        if self._outbox_taken is not None:
            self._outbox_taken.set()

    def _on_growth(self, reply: ReplyBuffer) -> None:
        self._grown[reply.message_id] = None
        if not self._is_urgent:
            cursor = self._cursors[reply.message_id]
            is_first = cursor.offset == 0 < reply.offset or cursor.attempt != reply.attempt
            # For a socket that takes nothing, each piece is the first: it would end the rounds of all others.
            self._schedule(urgent=self.blocked_since is None and (is_first or reply.terminal is not None))

    def _schedule(self, *, urgent: bool = False) -> None:
        """Flush once in the next round, however many pieces come until then; if it is urgent, before that."""
        if (urgent > self._is_urgent or not self._scheduled) and not self._stopped:
            self._scheduled, self._is_urgent = True, urgent
            self._scheduler.schedule(self._flush, urgent=urgent)

    def _flush(self) -> None:
        self._scheduled = self._is_urgent = False
        try:
            self._write_all()
        except Exception:
            # A defect of ours. The client reconnects and resumes; other sessions are not affected.
            log.exception("session writer failed")
            frame = self._frames.system(Code.SYSTEM_ERROR, Text.INTERNAL)
            self._socket.end(CloseCode.INTERNAL_ERROR, frame.encode())

    def _write_all(self) -> None:
        while not self._stopped:
            if not self._socket.is_writable:
                if self.blocked_since is None:
                    self.blocked_since = asyncio.get_running_loop().time()
                return
            self.blocked_since = None
            if not (self._outbox or self._grown):
                break
            if batch := self._next_batch():
                self._socket.write(batch)
        if self._closing is not None and not self._stopped:
            self.close_now()

    def _next_batch(self) -> list[str]:
        batch: list[str] = []
        size = 0
        while (self._outbox or self._grown) and len(batch) < MAX_BATCH and size < MAX_BATCH_SIZE:
            if (text := self._next_text()) is not None:
                batch.append(text)
                size += len(text)
        return batch

    def _next_text(self) -> str | None:
        if self._outbox:
            self._notify_drain()
            return self._outbox.pop(0).encode()
        message_id = next(iter(self._grown))
        cursor = self._cursors[message_id]
        step = cursor.advance()
        ended = isinstance(step, ReplyEnded)
        if step is None or ended or not cursor.has_more:
            del self._grown[message_id]
        if ended:
            del self._cursors[message_id]
            cursor.reply.unsubscribe(self._on_growth)
            self._sent_ends.pop(message_id, None)
            self._sent_ends[message_id] = cursor.reply.fence
            if len(self._sent_ends) > MAX_SENT_ENDS:
                del self._sent_ends[next(iter(self._sent_ends))]
        return None if step is None else self._frames.reply_step(message_id, step)
