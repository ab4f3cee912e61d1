"""The session pump: the one sender of a socket. Back-pressure and coalescing are all here.

It keeps how far this socket has read each reply. Whenever the socket takes a frame, the next one holds all that is new
by then: a fast socket gets each piece as it comes, a slow one fewer and larger ones, and nobody else waits.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from imstream.gateway.bell import Bell
from imstream.reply import Finished

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from imstream.gateway.phrases import Phrases
    from imstream.reply import Cursor, Reply
    from imstream.wire import ServerFrame

MAX_TOGETHER = 16
"""Most frames that are written in one go."""

MAX_OUTBOX = 32
"""Answers that may wait for the socket; then nothing more is read from it until it takes one."""


class Pump:
    """Sends what is said to one socket, and what is new in the replies that it follows."""

    __slots__ = (
        "_abandoned",
        "_closing",
        "_cursors",
        "_grown",
        "_news",
        "_outbox",
        "_phrases",
        "_send",
        "_taken",
        "sending_since",
    )

    def __init__(self, send: Callable[[Sequence[str]], Awaitable[None]], phrases: Phrases) -> None:
        self._send = send
        self._phrases = phrases
        self._outbox: list[ServerFrame] = []
        self._cursors: dict[str, Cursor] = {}
        self._grown: dict[str, None] = {}
        self._news = Bell()
        self._taken = Bell()
        self._closing = False
        self._abandoned = False
        self.sending_since: float | None = None
        """When the frame now being sent was begun (loop time); None when none is."""

    @property
    def followed(self) -> list[str]:
        """Ids of the messages whose end this socket has not seen."""
        return list(self._cursors)

    def say(self, frame: ServerFrame) -> None:
        """Queue a frame; it goes out before what is new in replies."""
        self._outbox.append(frame)
        self._news.ring()

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
            cursor.reply.watch(self._mark)
        self._mark(cursor.reply)

    def finish(self) -> None:
        """Let `run` return when everything that is known has been sent."""
        self._closing = True
        self._news.ring()

    async def run(self) -> None:
        """Send until `finish`."""
        loop = asyncio.get_running_loop()
        while True:
            frames = self._next_frames()
            if not frames:
                if self._closing:
                    return
                await self._news.wait()
                continue
            self.sending_since = loop.time()
            await self._send(frames)
            self.sending_since = None

    def abandon(self) -> None:
        """The socket is gone: follow nothing any more, and let nobody wait for room."""
        self._abandoned = True
        self._taken.ring()
        for cursor in self._cursors.values():
            cursor.reply.unwatch(self._mark)
        self._cursors.clear()
        self._grown.clear()

    def _next_frames(self) -> list[str]:
        frames: list[str] = []
        while len(frames) < MAX_TOGETHER and (frame := self._next()) is not None:
            frames.append(frame.encode())
        return frames

    def _next(self) -> ServerFrame | None:
        if self._outbox:
            self._taken.ring()
            return self._outbox.pop(0)
        while self._grown:
            message_id = next(iter(self._grown))
            step = self._cursors[message_id].advance()
            if step is None:
                del self._grown[message_id]
                continue
            if isinstance(step, Finished):
                del self._grown[message_id]
                self._cursors.pop(message_id).reply.unwatch(self._mark)
            return self._phrases.step(message_id, step)
        return None

    def _mark(self, reply: Reply) -> None:
        self._grown[reply.message_id] = None
        self._news.ring()
