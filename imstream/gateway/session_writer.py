"""The session pump: the one sender of a socket. Back-pressure and coalescing are all here.

It keeps how far this socket has read each reply. Whenever the socket takes a frame, the next one holds all that is new
by then: a fast socket gets each piece as it comes, a slow one fewer and larger ones, and nobody else waits.
"""

from __future__ import annotations

import asyncio

import structlog

from imstream.gateway.flush_scheduler import FlushScheduler
from imstream.gateway.frames import FrameBuilder
from imstream.gateway.wake_event import WakeEvent
from imstream.gateway.websocket_protocol import Socket
from imstream.reply_buffer import Cursor, ReplyBuffer, ReplyEnded
from imstream.texts import Text
from imstream.wire import CloseCode, Code, ServerFrame

log = structlog.get_logger()

MAX_TOGETHER = 16
"""Most frames that are written in one go."""

ENOUGH_TOGETHER = 65_536
"""Characters from which on no frame is added to such a write: it is what a stalled socket holds besides its reply."""

MAX_REMEMBERED = 32
"""Ends that a socket remembers having told: the notice that an answer begins may come after the answer itself, when the
node was frozen or its inbox out of reach."""

MAX_OUTBOX = 32
"""Answers that may wait for the socket; then nothing more is read from it until it takes one."""


class SessionWriter:
    """Sends what is said to one socket, and what is new in the replies that it follows."""

    __slots__ = (
        "_abandoned",
        "_cursors",
        "_ended",
        "_grown",
        "_last_words",
        "_loop",
        "_outbox",
        "_phrases",
        "_rounds",
        "_scheduled",
        "_socket",
        "_taken",
        "blocked_since",
    )

    def __init__(self, socket: Socket, phrases: FrameBuilder, rounds: FlushScheduler) -> None:
        self._socket = socket
        self._phrases = phrases
        self._rounds = rounds
        self._loop = asyncio.get_running_loop()
        self._outbox: list[ServerFrame] = []
        self._cursors: dict[str, Cursor] = {}
        self._ended: tuple[str, ...] = ()
        self._grown: dict[str, None] = {}
        self._taken = WakeEvent(self._loop)
        self._scheduled = False
        self._abandoned = False
        self._last_words: tuple[CloseCode, ServerFrame] | None = None
        self.blocked_since: float | None = None
        """Since when the socket has taken nothing although there is something to send (loop time)."""
        socket.on_room(self._schedule)

    @property
    def followed(self) -> list[str]:
        """Ids of the messages whose end this socket has not seen."""
        return list(self._cursors)

    def has_told(self, message_id: str) -> bool:
        """Whether this socket was told the end of a message, not long ago."""
        return message_id in self._ended

    def say(self, frame: ServerFrame) -> None:
        """Queue a frame; it goes out before what is new in replies."""
        self._outbox.append(frame)
        self._schedule()

    async def room(self) -> None:
        """Wait until the outbox has room again: who does not read is not read from."""
        while len(self._outbox) >= MAX_OUTBOX and not self._abandoned:
            await self._taken.wait()

    def follow(self, cursor: Cursor) -> None:
        """Send what is new in a reply from now on, until its end. A message already followed keeps its place."""
        if self._abandoned:
            return
        message_id = cursor.reply.message_id
        if message_id not in self._cursors:
            self._cursors[message_id] = cursor
            cursor.reply.subscribe(self._mark)
        self._mark(cursor.reply)

    def follow_anew(self, cursor: Cursor) -> None:
        """Follow a reply from where the cursor stands, wherever this socket has got to before."""
        if not self._abandoned and cursor.reply.message_id in self._cursors:
            self._cursors[cursor.reply.message_id] = cursor
        self.follow(cursor)

    def finish(self, code: CloseCode, last_words: ServerFrame) -> None:
        """Close the socket with these words when everything that is known has been sent."""
        self._last_words = (code, last_words)
        self._schedule()

    def abandon(self) -> None:
        """The socket is gone: follow nothing any more, and let nobody wait for room."""
        self._abandoned = True
        self._taken.ring()
        for cursor in self._cursors.values():
            cursor.reply.unsubscribe(self._mark)
        self._cursors.clear()
        self._grown.clear()
        self._socket.on_room(None)

    def _schedule(self) -> None:
        """Pump once in the next round, however many pieces come until then."""
        if not self._scheduled and not self._abandoned:
            self._scheduled = True
            self._rounds.join(self._pump)

    def _pump(self) -> None:
        self._scheduled = False
        try:
            self._send_what_is_due()
        except Exception:
            # A defect of ours. The client reconnects and resumes; nobody else notices.
            log.exception("pump failed")
            self._socket.end(CloseCode.INTERNAL_ERROR, self._phrases.system(Code.SYSTEM_ERROR, Text.INTERNAL).encode())

    def _send_what_is_due(self) -> None:
        while not self._abandoned:
            if not self._socket.has_room:
                if self.blocked_since is None:
                    self.blocked_since = self._loop.time()
                return
            self.blocked_since = None
            frames = self._next_frames()
            if not frames:
                break
            self._socket.write(frames)
        if self._last_words is not None and not self._abandoned:
            (code, frame), self._last_words = self._last_words, None
            self._socket.end(code, frame.encode())

    def _next_frames(self) -> list[str]:
        frames: list[str] = []
        size = 0
        while (self._outbox or self._grown) and len(frames) < MAX_TOGETHER and size < ENOUGH_TOGETHER:
            if (frame := self._next()) is not None:
                frames.append(frame)
                size += len(frame)
        return frames

    def _next(self) -> str | None:
        if self._outbox:
            self._taken.ring()
            return self._outbox.pop(0).encode()
        message_id = next(iter(self._grown))
        cursor = self._cursors[message_id]
        step = cursor.advance()
        ended = isinstance(step, ReplyEnded)
        if step is None or ended or not cursor.has_more:
            del self._grown[message_id]
        if ended:
            del self._cursors[message_id]
            cursor.reply.unsubscribe(self._mark)
            self._ended = (*self._ended[1 - MAX_REMEMBERED :], message_id)
        return None if step is None else self._phrases.step(message_id, step)

    def _mark(self, reply: ReplyBuffer) -> None:
        self._grown[reply.message_id] = None
        self._schedule()
