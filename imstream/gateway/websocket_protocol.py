"""A WebSocket connection on the sans-I/O protocol of websockets, with a bound on everything that a peer can cause.

Input: bytes are cut into pieces, parsed to frames and joined to messages, which `receive` returns; while one waits,
nothing more is read. Peers over the frame rate are throttled, not disconnected: their data waits in the network.
Every frame counts, also pings and fragments; one that is large or expensive counts as several. Output goes straight to
the transport. uvicorn's own protocol has none of these bounds, and frees a closed socket only by garbage collection.

Undocumented attributes of `ServerProtocol`: parser, parser_exc, reader, close_sent, close_rcvd (test_private_names.py).
"""
# ruff: noqa: D102 - the callbacks of asyncio.Protocol are described there

import asyncio
import logging
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from traceback import clear_frames
from urllib.parse import unquote

import structlog
from starlette.requests import HTTPConnection
from websockets.frames import Close, Frame, Opcode
from websockets.frames import CloseCode as StandardCode
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.typing import BytesLike

from imstream.codes import CloseCode
from imstream.token_bucket import NEVER_USED, TokenBucket

MAX_FRAGMENTS = 1_000
"""Maximum fragments of one message; empty ones do not count towards its size. More closes 1009."""

MAX_FIRST = 16_384
"""Maximum bytes of a message before the login: an INIT with all that it may resume and a long token. More: 1009."""

CLOSE_REPLY_LIMIT = 2.0
"""Seconds a peer has to read its last frames and answer the close frame; then the connection is aborted."""

PIECE = 2048
"""Bytes that are parsed at a time: up to 340 frames, 5 ms. The event loop reads up to 256 KB at once."""

BYTES_PER_FRAME = 4096
"""Bytes that count as one frame towards the rate. A typical frame has a tenth of that."""

SECONDS_PER_FRAME = 0.001
"""CPU time that counts as one frame towards the rate. A typical frame takes a tenth of that."""

NOTICE_INTERVAL = 1.0
"""Minimum seconds between two calls of `on_throttle`: a flooder must not be answered frame by frame."""

# RFC 6455, section 5.2
_MAX_FRAME_HEADER = 14
_FINAL_TEXT = 0x81
_HEAD_7_BITS, _HEAD_16_BITS, _HEAD_64_BITS = struct.Struct("!BB"), struct.Struct("!BBH"), struct.Struct("!BBQ")

log = structlog.get_logger()


def text_frame(text: str) -> bytes:
    """A text frame of a server (RFC 6455, section 5.2). It takes 0.2 µs to build; with websockets it takes 1.1."""
    payload = text.encode()
    size = len(payload)
    if size < 126:  # noqa: PLR2004 - by the RFC
        return _HEAD_7_BITS.pack(_FINAL_TEXT, size) + payload
    if size < 65_536:  # noqa: PLR2004 - same
        return _HEAD_16_BITS.pack(_FINAL_TEXT, 126, size) + payload
    return _HEAD_64_BITS.pack(_FINAL_TEXT, 127, size) + payload


@dataclass(frozen=True, slots=True)
class SocketClosed:
    """The last message of a socket: it is closed, with this code."""

    code: int


ServeSocket = Callable[["SocketProtocol"], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class SocketOptions:
    """The common part of all sockets of a node; `serve` runs one from its handshake to its end."""

    max_message: int
    frame_rate: TokenBucket | None
    serve: ServeSocket


@dataclass(slots=True, eq=False, repr=False)
class SocketProtocol(asyncio.Protocol):
    """One WebSocket connection. `accept` or `reject` the `request`, then `receive` until `SocketClosed`.

    Attributes:
        request: The handshake. `accept` frees it: up to 16 KB, and several times that as objects.
        received_at: When the message that `receive` returned last was read from the network, in loop time. This is
            before its turn: the time of an iteration of the event loop is that of its poll.
        is_writable: Whether the peer has read enough of the written data.
        on_writable: Is called when the socket becomes writable again.
        on_throttle: Is called with the seconds for which reading is paused, at most once a second.
    """

    _options: SocketOptions
    _connections: set[asyncio.Protocol]
    _tasks: set[asyncio.Task[None]]
    request: HTTPConnection = field(init=False)
    received_at: float = 0.0
    is_writable: bool = True
    on_writable: Callable[[], None] | None = None
    on_throttle: Callable[[float], None] | None = None
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _transport: asyncio.Transport = field(init=False)
    _websocket: ServerProtocol = field(init=False)
    _response: Response = field(init=False)
    _unread: bytes | memoryview = b""
    _read_at: float = 0.0
    _fragments: list[BytesLike] = field(default_factory=list)
    _fragments_size: int = 0
    _is_text: bool = False
    _messages: list[str | bytes | SocketClosed] = field(default_factory=list)
    _arrived: asyncio.Future[None] | None = None
    _trusted: bool = False
    _reading_paused: bool = False
    _full_at: float = NEVER_USED
    _noticed_at: float = -NOTICE_INTERVAL
    _throttle_timer: asyncio.TimerHandle | None = None
    _late_pong: bytes = b""
    _closing: bool = False
    _abort_timer: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        # Its own logger would log each handshake at level info.
        logger = logging.getLogger("uvicorn.error")
        self._websocket = ServerProtocol(max_size=self._options.max_message, logger=logger)

    # For the session

    def accept(self, subprotocol: str | None) -> None:
        """Answer the handshake with 101, and free it."""
        response = self._response
        del self._response, self.request
        if self._transport.is_closing():
            self._closing = True
            return
        if subprotocol is not None:
            response.headers["Sec-WebSocket-Protocol"] = subprotocol
        self._websocket.send_response(response)
        self._flush()

    def reject(self, status: HTTPStatus, text: str = "", headers: Mapping[str, str] | None = None) -> None:
        """Answer the handshake with an error."""
        self._response = self._websocket.reject(status, text)
        self._response.headers.update(headers or {})
        self._send_rejection()

    async def receive(self) -> str | bytes | SocketClosed:
        """The next message. The one after it is read now; before the login, which may allow it to be larger, later."""
        if not self._trusted:
            self._resume_reading()
        while not self._messages:
            self._arrived = self._loop.create_future()
            await self._arrived
        message, self.received_at = self._messages.pop(0), self._read_at  # nothing was read since: reading is paused
        if self._trusted:
            self._resume_reading()
        return message

    def trust(self) -> None:
        """Accept messages up to the size of the settings: a user has logged in."""
        self._trusted = True
        self._resume_reading()

    def charge(self, frames: float) -> None:
        """Count so many frames towards the rate; over the rate, pause reading."""
        bucket = self._options.frame_rate
        if bucket is None or self._closing or self._transport.is_closing():
            return
        now = self._loop.time()
        self._full_at = bucket.consume(self._full_at, now, frames)
        wait = bucket.wait_time(self._full_at, now)
        if wait > 0 and self._throttle_timer is None:
            self._transport.pause_reading()
            self._throttle_timer = self._loop.call_later(wait, self._end_throttle)
            if self.on_throttle is not None and now - self._noticed_at >= NOTICE_INTERVAL:
                self._noticed_at = now
                self.on_throttle(wait)

    def write(self, texts: Sequence[str]) -> None:
        """Write text frames with one system call. Does nothing once the socket is closing."""
        if not self._closing:
            self._transport.write(b"".join(map(text_frame, texts)))

    def end(self, code: CloseCode, last_text: str) -> None:
        """Write a last text and the close frame behind unsent data, and abort if the peer does not answer it."""
        if self._closing:
            self._transport.abort()
            return
        self.write([last_text])
        self._send_close(code)
        self._abort_later()
        # Read whatever comes, without a limit on the rate, until the peer's close frame.
        self._reading_paused = False
        self._end_throttle()

    # For the transport and the server

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._connections.add(self)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._read_at = self._loop.time()
        self._unread = memoryview(bytes(self._unread) + data if self._unread else data)
        self._read()

    def pause_writing(self) -> None:
        self.is_writable = False

    def resume_writing(self) -> None:
        self.is_writable = True
        if self._late_pong:
            self._transport.write(self._late_pong)
            self._late_pong = b""
        if self.on_writable is not None:
            self.on_writable()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._closing = True
        self._connections.discard(self)
        self._put(SocketClosed(StandardCode.NO_STATUS_RCVD))
        for timer in (self._throttle_timer, self._abort_timer):
            if timer is not None:
                timer.cancel()
        self._throttle_timer = self._abort_timer = None
        self._unread = b""
        # The parser is a generator that refers to its protocol; so does the traceback of its exception.
        websocket = self._websocket
        websocket.parser = websocket.parser_exc = websocket.handshake_exc = None  # type: ignore[assignment]

    def shutdown(self) -> None:
        """Close when the server stops. The sessions were closed before, with a sentence."""
        if self._websocket.state is State.OPEN:
            self._send_close(CloseCode.DRAINING)
        self._transport.close()

    # Input

    def _read(self) -> None:
        """Parse the received data, piece by piece, until there is a message or the rate is exceeded."""
        while self._unread and not (self._reading_paused or self._throttle_timer or self._transport.is_closing()):
            piece, self._unread = bytes(self._unread[:PIECE]), self._unread[PIECE:]
            self.charge(max(self._parse(piece), len(piece) / BYTES_PER_FRAME))
        if not self._unread:
            self._unread = b""  # the view would keep data that was read
        if not (self._reading_paused or self._throttle_timer):
            self._transport.resume_reading()

    def _resume_reading(self) -> None:
        if self._reading_paused and not self._messages:
            self._reading_paused = False
            self._read()

    def _end_throttle(self) -> None:
        if self._throttle_timer is not None:
            self._throttle_timer.cancel()
            self._throttle_timer = None
        self.charge(0)  # wait on for what was charged meanwhile
        self._read_at = self._loop.time()  # the wait was the client's own
        self._read()

    def _parse(self, piece: bytes) -> int:
        """Parse a piece and handle its frames; how many there are."""
        websocket = self._websocket
        websocket.receive_data(piece)
        if websocket.parser_exc is not None:
            self._close(websocket.close_sent)
            return 0
        events = websocket.events_received()
        for event in events:
            if isinstance(event, Request):
                self._start(event)
            elif isinstance(event, Frame):
                self._handle(event)
        if replies := b"".join(websocket.data_to_send()):
            if self.is_writable:
                self._transport.write(replies)
            else:
                self._late_pong = replies  # instead of earlier ones (RFC 6455, section 5.5.3)
        if websocket.handshake_exc is not None and not self._closing:  # the request cannot be parsed
            if not replies:
                status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
                self._transport.write(websocket.reject(status, "The request headers are too large").serialize())
            self._closing = True
            self._transport.close()
        if not self._trusted and len(websocket.reader.buffer) > MAX_FIRST + _MAX_FRAME_HEADER:
            self._fail(CloseCode.FRAME_TOO_BIG, "too big before INIT")
        return len(events)

    def _start(self, request: Request) -> None:
        """Have a handshake served, or reject it if it is not valid."""
        self._response = self._websocket.accept(request)
        if (error := self._websocket.handshake_exc) is None:
            self.request = _connection_of(request, self._transport)
            self._pause_reading()
            task = self._loop.create_task(self._serve())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self._send_rejection()
            # The request keeps the error, whose tracebacks refer to both, in all frames down to the event loop.
            clear_frames(error.__traceback__)
            error.__traceback__ = error.__context__ = error.__cause__ = self._websocket.handshake_exc = None
        # The parser keeps the request as long as the connection.
        request.headers.clear()
        request.path = ""

    async def _serve(self) -> None:
        try:
            await self._options.serve(self)
        except Exception:
            log.exception("connection failed")
        finally:
            if self._abort_timer is None:
                self._transport.close()

    def _handle(self, frame: Frame) -> None:
        """Handle a frame. websockets has answered pings already."""
        if frame.opcode is Opcode.CLOSE:
            self._close(self._websocket.close_rcvd)
        elif frame.opcode is Opcode.CONT and len(self._fragments) >= MAX_FRAGMENTS:
            self._fail(CloseCode.FRAME_TOO_BIG, "too many fragments")
        elif frame.opcode < Opcode.CLOSE:  # not a control frame
            if frame.opcode is not Opcode.CONT:
                self._is_text = frame.opcode is Opcode.TEXT
                self._fragments, self._fragments_size = [], 0
            self._fragments.append(frame.data)
            self._fragments_size += len(frame.data)
            if not self._trusted and self._fragments_size > MAX_FIRST:
                self._fail(CloseCode.FRAME_TOO_BIG, "too big before INIT")
            elif frame.fin:
                self._handle_message()

    def _handle_message(self) -> None:
        data, self._fragments = b"".join(self._fragments), []
        if self._closing:
            return
        try:
            self._put(data.decode() if self._is_text else data)
        except UnicodeDecodeError:
            self._fail(CloseCode.INVALID_TEXT, CloseCode.INVALID_TEXT.reason)
        else:
            self._pause_reading()

    def _pause_reading(self) -> None:
        if not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()

    def _put(self, message: str | bytes | SocketClosed) -> None:
        self._messages.append(message)
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    # Output

    def _flush(self) -> None:
        self._transport.write(b"".join(self._websocket.data_to_send()))

    def _send_rejection(self) -> None:
        self._closing = True
        self._websocket.send_response(self._response)
        self._flush()
        self._transport.close()

    def _send_close(self, code: CloseCode) -> None:
        self._closing = True
        self._websocket.send_close(code, code.reason)
        self._flush()
        self._put(SocketClosed(code))

    def _fail(self, code: int, reason: str) -> None:
        """Close because of invalid data of the peer."""
        if not self._closing:
            self._fragments = []
            self._websocket.fail(code, reason)
            self._close(self._websocket.close_sent)

    def _close(self, close: Close | None) -> None:
        """Send the close frame that websockets has prepared, and close, also when the peer does not read."""
        if not self._closing:
            self._closing = True
            self._put(SocketClosed(close.code if close else StandardCode.NO_STATUS_RCVD))
        self._flush()
        self._transport.close()
        self._abort_later()

    def _abort_later(self) -> None:
        if self._abort_timer is not None:
            self._abort_timer.cancel()
        self._abort_timer = self._loop.call_later(CLOSE_REPLY_LIMIT, self._transport.abort)


def _connection_of(request: Request, transport: asyncio.Transport) -> HTTPConnection:
    path, _, query = request.path.partition("?")
    peer = transport.get_extra_info("peername")
    return HTTPConnection({
        "type": "websocket",
        "path": unquote(path),
        "query_string": query.encode("ascii", "surrogateescape"),
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in request.headers.raw_items()],
        "client": peer[:2] if peer else None,
    })  # fmt: skip
