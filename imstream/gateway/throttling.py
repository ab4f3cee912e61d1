"""What comes in on a socket is read in small pieces, and no faster than its pace.

Who sends more than that is told `RATE_LIMITED`, and is not read from until the pace allows it: nothing that was
sent is lost, it waits in the network, and costs nobody else anything. Every frame counts: those with our messages, and
those that are broken, binary, pings, or fragments. A frame that is large, takes long to understand, or asks for much
counts as several.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn._types import ASGIReceiveEvent
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from imstream.gateway.http_protocol import GatewayConfig
from imstream.token_bucket import NEVER_USED

PIECE = 2048
"""Bytes that are read in one go: up to 340 frames, 5 ms. The event loop has read 256 KB at once by then."""

BYTES_A_FRAME = 4096
"""Bytes that count as a frame. A usual one has a tenth."""

SECONDS_A_FRAME = 0.001
"""CPU time that counts as a frame. A usual one takes a tenth."""

TOLD_APART = 1.0
"""Least seconds between two times that a peer is told: a flooder must not be answered frame by frame."""


class ThrottledProtocol(WebSocketsSansIOProtocol):
    """uvicorn's protocol, fed with pieces."""

    _unread: bytes | memoryview = b""
    _frames = 0
    _trusted = False
    _full_at = NEVER_USED
    _rest: asyncio.TimerHandle | None = None
    _on_rest: Callable[[float], None] | None = None
    _told_at = -TOLD_APART

    def __init__(self, config: GatewayConfig, **given: Any) -> None:  # noqa: ANN401 - uvicorn's
        super().__init__(config, **given)
        self._pace = config.frame_pace

    def on_rest(self, call: Callable[[float], None] | None) -> None:
        """See `Socket`."""
        self._on_rest = call

    def data_received(self, data: bytes) -> None:
        """Take bytes."""
        self._unread = memoryview(bytes(self._unread) + data if self._unread else data)
        self._read_on()

    def feed(self, data: bytes) -> None:
        """Take a piece of them."""
        super().data_received(data)

    def charge(self, frames: float) -> None:
        """See `Socket`."""
        if self._pace is None or self.close_sent or self.transport.is_closing():
            return
        now = self.loop.time()
        self._full_at = self._pace.consume(self._full_at, now, frames)
        wait = self._pace.wait_time(self._full_at, now)
        if wait > 0 and self._rest is None:
            self.transport.pause_reading()
            self._rest = self.loop.call_later(wait, self._go_on)
            if self._on_rest is not None and now - self._told_at >= TOLD_APART:
                self._told_at = now
                self._on_rest(wait)

    async def receive(self) -> ASGIReceiveEvent:
        """Give the application what comes next. As uvicorn does it, but there may be more to read already."""
        if not self._trusted:
            self._resume()  # only now: the message before may have been the login, and more is taken after it
        event = await self.queue.get()
        if self._trusted:
            self._resume()
        return event

    def trust(self) -> None:
        """See `Socket`."""
        self._trusted = True
        self._resume()

    def handle_events(self) -> None:
        """Obey frames, and see how many there are."""
        self._frames += len(self.conn.events)
        super().handle_events()

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer is gone."""
        self._end_rest()
        self._unread = b""
        super().connection_lost(exc)

    def read_to_the_end(self) -> None:
        """Read whatever comes, for the peer's close frame; the application does not want more."""
        self._end_rest()
        self.read_paused = False
        self._read_on()

    def _resume(self) -> None:
        """Read on, if the application has taken all that came."""
        if self.read_paused and self.queue.empty():
            self.read_paused = False
            self._read_on()

    def _read_on(self) -> None:
        """Read what there is, until the application has something to do or the pace forbids it."""
        while self._unread and not (self.read_paused or self._rest or self.transport.is_closing()):
            piece, self._unread = bytes(self._unread[:PIECE]), self._unread[PIECE:]
            self._frames = 0
            self.feed(piece)
            self.charge(max(self._frames, len(piece) / BYTES_A_FRAME))
        if not self._unread:
            self._unread = b""  # the view would keep what was read
        if not (self.read_paused or self._rest):
            self.transport.resume_reading()

    def _go_on(self) -> None:
        self._rest = None
        self._read_on()

    def _end_rest(self) -> None:
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None
