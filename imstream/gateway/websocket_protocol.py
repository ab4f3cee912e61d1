"""uvicorn's protocol for sockets, mended where a hostile or stalled peer could hurt others.

Found in uvicorn 0.54: an upgrade request that its parser refuses gets no answer and makes the shutdown fail; a stalled
reader blocks `send`, and with it every orderly close, also the one it asks for itself; fragments without end, and
answers to pings that nobody reads, gather without limit; what a handshake said is kept as long as its socket, and a
closed socket until the garbage collector runs.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Sequence
from traceback import clear_frames
from typing import Any, Protocol

from starlette.types import Scope
from uvicorn._types import ASGIReceiveEvent, ASGISendEvent
from websockets.exceptions import InvalidState
from websockets.frames import Frame
from websockets.http11 import Request
from websockets.protocol import State

from imstream.gateway.http_protocol import HEADERS_TOO_LARGE, GatewayConfig
from imstream.gateway.throttling import ThrottledProtocol
from imstream.gateway.wake_event import WakeEvent

MAX_FRAGMENTS = 1_000
"""Most fragments of one message; empty ones do not count towards its size. More closes 1009."""

MAX_FIRST = 16_384
"""Most bytes of a message before the login: an INIT with all that it may resume, and with a long token."""

_LONGEST_HEAD = 14
"""Bytes of a frame before what it carries (RFC 6455, section 5.2)."""

CLOSE_REPLY_LIMIT = 2.0
"""Seconds a peer has to read its last frames and answer the close frame; then the connection is cut."""

_EXTENSION = "imstream.socket"

_FINAL_TEXT = 0x81
_HEAD_7_BITS, _HEAD_16_BITS, _HEAD_64_BITS = struct.Struct("!BB"), struct.Struct("!BBH"), struct.Struct("!BBQ")


def text_frame(text: str) -> bytes:
    """A text frame from a server, without extensions (RFC 6455, section 5.2).

    Nearly all that a node sends are these. websockets makes one through a dataclass and a BytesIO, in 1.1 µs, not 0.2.
    """
    payload = text.encode()
    size = len(payload)
    if size < 126:  # noqa: PLR2004 - RFC 6455, section 5.2
        return _HEAD_7_BITS.pack(_FINAL_TEXT, size) + payload
    if size < 65_536:  # noqa: PLR2004 - same
        return _HEAD_16_BITS.pack(_FINAL_TEXT, 126, size) + payload
    return _HEAD_64_BITS.pack(_FINAL_TEXT, 127, size) + payload


class Socket(Protocol):
    """A socket under its session: more direct than ASGI, and able to end a peer that does not read."""

    @property
    def has_room(self) -> bool:
        """Whether the peer has taken enough of what was written."""

    def on_room(self, call: Callable[[], None] | None) -> None:
        """Have `call` called whenever there is room again."""

    def on_rest(self, call: Callable[[float], None] | None) -> None:
        """Have `call` called with the seconds for which the peer is not read from, because it sends too much.

        It is called at most once a second.
        """

    def charge(self, frames: float) -> None:
        """Count what was sent as so many frames more: it has cost that much. See `BYTES_A_FRAME`."""

    def trust(self) -> None:
        """Take messages up to the size that is set: somebody has logged in."""

    def write(self, texts: Sequence[str]) -> None:
        """Write text frames in one go. Nothing happens when the peer is gone: the receiver is told."""

    def end(self, code: int, last_words: str) -> None:
        """Put `last_words` and the close frame behind what is unsent; a peer that does not answer is cut off."""

    def forget_handshake(self) -> None:
        """Free what the handshake said: up to 16 KB, and several times that as objects. Its scope is empty then."""


def socket_of(scope: Scope) -> Socket:
    """The protocol under an ASGI WebSocket scope."""
    socket: Socket = scope["extensions"][_EXTENSION]
    return socket


class _Inbox:
    """What uvicorn uses of asyncio.Queue, for its one reader, in a tenth of the memory."""

    __slots__ = ("_bell", "_events")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._events: list[ASGIReceiveEvent] = []
        self._bell = WakeEvent(loop)

    def empty(self) -> bool:
        return not self._events

    def put_nowait(self, event: ASGIReceiveEvent) -> None:
        self._events.append(event)
        self._bell.ring()

    async def get(self) -> ASGIReceiveEvent:
        while not self._events:
            await self._bell.wait()
        return self._events.pop(0)


class SocketProtocol(ThrottledProtocol):
    """One WebSocket connection."""

    _late_pong = b""
    _on_room: Callable[[], None] | None = None

    def __init__(self, config: GatewayConfig, **given: Any) -> None:  # noqa: ANN401 - uvicorn's
        super().__init__(config, **given)
        self.queue = _Inbox(self.loop)  # type: ignore[assignment]

    def handle_connect(self, event: Request) -> None:
        """Let the application reach this object through its scope."""
        super().handle_connect(event)
        if self.response.status_code == 101:  # noqa: PLR2004 - Switching Protocols
            self.scope["extensions"][_EXTENSION] = self  # type: ignore[assignment]
            # Until it is accepted, nothing of it can be refused in order.
            self.read_paused = True
            self.transport.pause_reading()
        # The parser of websockets holds its request as long as the connection.
        event.headers.clear()
        event.path = ""
        if self.conn.handshake_exc is not None:  # its traceback holds it, and all frames down to the event loop
            clear_frames(self.conn.handshake_exc.__traceback__)
            event._exception = self.conn.handshake_exc = None  # noqa: SLF001 - websockets never forgets it
        del self.request

    async def run_asgi(self) -> None:
        """Run the application; then its scope, which leads back here, is no longer needed."""
        try:
            await super().run_asgi()
        finally:
            self.scope.clear()  # type: ignore[attr-defined]

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer is gone."""
        super().connection_lost(exc)
        # The parser is a generator that holds `conn`, and so does the traceback of its exception.
        self.conn.parser = self.conn.parser_exc = self.conn.handshake_exc = None  # type: ignore[assignment]

    async def send(self, message: ASGISendEvent) -> None:
        """Send what the application says. uvicorn does not see that a refusal ends the handshake, and logs an error."""
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and self.close_sent:
            self.handshake_complete = True

    def feed(self, data: bytes) -> None:
        """Take bytes; answer an upgrade request that cannot be read, which uvicorn leaves without an answer."""
        super().feed(data)
        if not self._trusted and len(self.conn.reader.buffer) > MAX_FIRST + _LONGEST_HEAD:
            self._fail(1009, "too big before INIT")
        if self.conn.handshake_exc is not None and not self.handshake_initiated and not self.close_sent:
            self.close_sent = True
            self.transport.write(b"".join(self.conn.data_to_send()) or HEADERS_TOO_LARGE)
            self.transport.close()

    def handle_close(self, event: Frame) -> None:
        """Close as the peer asks, also when it does not read."""
        super().handle_close(event)
        self._cut_off_later()

    def handle_parser_exception(self) -> None:
        """Close with the code of what is wrong, also when the peer does not read."""
        super().handle_parser_exception()
        self._cut_off_later()

    def handle_cont(self, event: Frame) -> None:
        """Take a fragment, up to the limit."""
        if len(self.frames) >= MAX_FRAGMENTS:
            self._fail(1009, "too many fragments")
        elif not self._trusted and (self.conn.current_size or 0) > MAX_FIRST:
            self._fail(1009, "too big before INIT")
        else:
            super().handle_cont(event)

    def send_receive_event_to_app(self) -> None:
        """Hand a message on. Text that is no UTF-8 is the peer's fault, and not worth a traceback in our log."""
        if not self._trusted and sum(map(len, self.frames)) > MAX_FIRST:
            self._fail(1009, "too big before INIT")
            return
        if self.curr_msg_data_type == "text":
            message = b"".join(self.frames)
            try:
                message.decode()
            except UnicodeDecodeError:
                self._fail(1007, "not UTF-8")
                return
            self.frames = [message]
        super().send_receive_event_to_app()

    def handle_ping(self) -> None:
        """Answer a ping; while the peer does not read, only the latest answer waits for it (RFC 6455, 5.5.3)."""
        if self.writable.is_set():
            super().handle_ping()
        else:
            self._late_pong = b"".join(self.conn.data_to_send()) or self._late_pong

    def resume_writing(self) -> None:
        """The peer reads again."""
        super().resume_writing()
        if self._late_pong:
            self.transport.write(self._late_pong)
            self._late_pong = b""
        if self._on_room is not None:
            self._on_room()

    def shutdown(self) -> None:
        """Close at shutdown, also a connection that never came to its handshake."""
        if not self.handshake_initiated:
            self.transport.close()
            return
        super().shutdown()

    @property
    def has_room(self) -> bool:
        """See `Socket`."""
        return self.writable.is_set()

    def on_room(self, call: Callable[[], None] | None) -> None:
        """See `Socket`."""
        self._on_room = call

    def write(self, texts: Sequence[str]) -> None:
        """See `Socket`. One system call for all frames: each costs as much as making several."""
        if self.disconnected or self.close_sent or self.conn.state is not State.OPEN:
            return
        self.transport.write(b"".join(map(text_frame, texts)))

    def end(self, code: int, last_words: str) -> None:
        """See `Socket`. It waits for nobody: the peer may not be reading at all."""
        self.write([last_words])
        if self.disconnected or self.close_sent:
            self.transport.abort()
            return
        try:
            self.conn.send_close(code)
        except InvalidState:
            self.transport.abort()
            return
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": ""})
        self._cut_off_later()
        self.read_to_the_end()

    def forget_handshake(self) -> None:
        """See `Socket`."""
        del self.response
        # Starlette refers to this list, too.
        self.scope["headers"].clear()  # type: ignore[attr-defined]
        self.scope["subprotocols"] = []
        self.scope["query_string"] = self.scope["raw_path"] = b""

    def _fail(self, code: int, reason: str) -> None:
        """Close because of what the peer has sent."""
        if self.close_sent or self.disconnected:
            return
        self.frames = []
        self.conn.fail(code, reason)
        self.handle_parser_exception()

    def _cut_off_later(self) -> None:
        if self.close_timer is None and not self.disconnected:
            self.close_timer = self.loop.call_later(CLOSE_REPLY_LIMIT, self.transport.abort)
