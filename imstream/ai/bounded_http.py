"""HTTP connections to untrusted servers: every response is bounded, and its body is delivered where it arrives.

aiohttp bounds each header field and their number (8190 bytes, 128), but neither interim responses (1xx) nor bytes that
belong to no request. It also reads as much as the kernel has: several megabytes in one turn of the event loop.

The only file that uses private names of aiohttp: `TCPConnector._factory`, `ResponseHandler._payload`, `_buffer` and
`_reading_paused`, and attributes of `StreamReader`. They buy the bounds, for which aiohttp has no hook, and with
`stream_body` and `_BodyBuffer` a quarter of the calls of functions that a paced answer takes a node.
tests/unit/test_private_names.py checks them.
"""

import asyncio
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, cast

import aiohttp
from aiohappyeyeballs import AddrInfoType
from aiohttp import StreamReader
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.streams import EMPTY_PAYLOAD
from yarl import URL

HEAD_LIMIT = 32 * 1024  # bytes of the head of a response, including all interim responses before it
OVERHEAD_LIMIT = 512 * 1024  # bytes of a response that are not body, such as chunk sizes, beyond the size of its body
RECEIVE_BUFFER = 32 * 1024  # bytes; maximum that is parsed in one turn of the event loop
_LAST_CHUNK = b"0\r\n\r\n"  # of a body in chunks (RFC 9112, section 7.1)
_SLICE = 2048  # bytes of a head that are parsed at once: by how much a read can exceed the limit

ENCODED = "a body with a content encoding, which is not supported"


class ResponseTooLarge(aiohttp.ClientPayloadError):
    """The body of a response is larger than the limit."""


class BodyBroken(Exception):  # noqa: N818 - reads as what happened
    """A body is incomplete. `cause`: aiohttp's exception."""

    def __init__(self, cause: aiohttp.ClientError | OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class BoundedHandler(ResponseHandler):
    """aiohttp's protocol of one connection, with limits for each response; delivers to `body` where it receives.

    It also aborts a connection that receives a response without a request, which aiohttp would take for the response to
    the next request.

    While it is held, the event loop does not watch the socket: data waits in the kernel, and `release` reads it with
    one system call, which is cheaper than being woken. Only its transport can read a TLS connection: there it gathers.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, *, limit: int) -> None:
        super().__init__(loop)
        self.body: StreamedBody | None = None
        self._limit = limit
        self._head_remaining = 0
        self._allowed = 0
        self._unchecked = 0  # bytes that may be received before the limits are checked again
        self._gathered: list[bytes] | None = None  # received since `hold`; None: nothing is held
        self._gathered_size = 0
        self._socket: int | None = None  # its descriptor; None: only the transport can read, or is to find the end
        self._is_polled = False  # the transport does not read, because `release` does

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        super().connection_made(transport)
        self._socket = readable_socket(transport)

    def set_response_params(self, **params: Any) -> None:  # noqa: ANN401 - passed through
        """Called by aiohttp before it sends a request."""
        if len(self):
            self._buffer.clear()
            self._abort()
        self._head_remaining = HEAD_LIMIT
        self._unchecked = self._allowed = OVERHEAD_LIMIT
        super().set_response_params(**params)

    def hold(self) -> None:
        """Hold received data, unless it is large, or the end of a body."""
        self._gathered, self._gathered_size = [], 0
        if self._socket is not None and not self._is_polled and self.transport is not None:
            self._is_polled = True
            self.transport.pause_reading()

    def release(self) -> None:
        """Parse the data received meanwhile, deliver it, and continue unless `body` holds again."""
        gathered, self._gathered = self._gathered, None
        if gathered is None:
            return
        if data := self._poll():
            gathered.append(data)
        if gathered:
            self.data_received(b"".join(gathered))
        elif self.body is not None:
            self.body.deliver()
        if self._gathered is None:
            self._stop_polling()

    def _poll(self) -> bytes:
        # The descriptor of a closed transport may be another connection's.
        if not self._is_polled or self._socket is None or self.transport is None or self.transport.is_closing():
            return b""
        try:
            data = os.read(self._socket, RECEIVE_BUFFER)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:  # the end, or an error, which the transport finds as well
            self._socket = None
            self._stop_polling()
        return data

    def _stop_polling(self) -> None:
        if self._is_polled and self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()
        self._is_polled = False

    def data_received(self, data: bytes) -> None:
        """Called by the event loop, and by aiohttp (without data) to parse its buffer."""
        if data and self._gathered is not None:
            self._gathered.append(data)
            self._gathered_size += len(data)
            if self._gathered_size < RECEIVE_BUFFER and not data.endswith(_LAST_CHUNK):
                return
            data = b"".join(self._gathered)
            self.hold()
        payload = self._payload
        if payload is None or (self.body is None and payload.is_eof()):
            self._receive_head(data)
        else:
            self._unchecked -= len(data)
            if self._unchecked >= 0 or self._within_limits(payload):
                super().data_received(data)
            else:
                self._abort()
        if self.body is not None:
            self.body.deliver()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Called by the event loop."""
        self.release()
        super().connection_lost(exc)
        if self.body is not None:
            self.body.deliver()

    def _within_limits(self, payload: StreamReader) -> bool:
        """Check the limits of a response; called occasionally, not for each read."""
        received = self._allowed - self._unchecked
        allowed = min(self._limit, OVERHEAD_LIMIT + 2 * payload.total_bytes)
        if received <= allowed:
            self._allowed, self._unchecked = allowed, allowed - received
            return True
        what = "a response" if received > self._limit else f"{payload.total_bytes} bytes in a response"
        payload.set_exception(ResponseTooLarge(f"{what} of more than {allowed} bytes"))
        return False

    def _receive_head(self, data: bytes) -> None:
        if not data:
            super().data_received(data)
        while data and self.exception() is None and (self._payload is None or self._payload.is_eof()):
            piece, data = data[:_SLICE], data[_SLICE:]
            self._head_remaining -= len(piece)
            if self._head_remaining < 0:
                self.set_exception(HttpProcessingError(message="the head is too long"))
                self._abort()
                return
            super().data_received(piece)
        if self._payload is not None:
            _BodyBuffer.replace(self._payload)
        if data and self.exception() is None:
            self.data_received(data)

    def _abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class _NoCookies(aiohttp.DummyCookieJar):
    """Keeps no cookies, and does not parse them."""

    def update_cookies_from_headers(self, headers: Sequence[str], response_url: URL) -> None:
        """See `aiohttp.abc.AbstractCookieJar`."""


def bounded_session(*, headers: Mapping[str, str], limit: int, keep_alive: timedelta) -> aiohttp.ClientSession:
    """A session without time limits, which are the caller's, and with any number of connections.

    `limit`: maximum bytes of a response. `keep_alive`: how long an unused connection is kept open.
    """
    connector = aiohttp.TCPConnector(
        limit=0, keepalive_timeout=keep_alive.total_seconds(), socket_factory=_small_socket
    )
    handler = partial(BoundedHandler, asyncio.get_running_loop(), limit=limit)
    connector._factory = cast("partial[ResponseHandler]", handler)  # noqa: SLF001 - see above
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=_NoCookies(),
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None),
        auto_decompress=False,  # a kilobyte can decompress to a megabyte
        read_bufsize=RECEIVE_BUFFER,
    )


def _small_socket(address: AddrInfoType) -> socket.socket:
    family, kind, protocol, _, _ = address
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    return sock


def readable_socket(transport: asyncio.BaseTransport) -> int | None:
    """The file descriptor whose bytes are those of the protocol; None for TLS."""
    if transport.get_extra_info("sslcontext") is not None:
        return None
    descriptor: int = transport.get_extra_info("socket").fileno()
    return descriptor


def is_encoded(response: aiohttp.ClientResponse) -> bool:
    """Whether the body has a content encoding, although `identity` was requested."""
    codings = ",".join(response.headers.getall("Content-Encoding", ())).split(",")
    return any(coding.strip().lower() not in {"", "identity"} for coding in codings)


class _BodyBuffer(StreamReader):
    """aiohttp's buffer of a body, to be read as a whole. For each chunk, aiohttp's own makes 15 calls more."""

    __slots__ = ()

    begin_http_chunk_receiving = end_http_chunk_receiving = staticmethod(bool)  # type: ignore[assignment] # no effect

    @classmethod
    def replace(cls, content: StreamReader) -> None:
        """Replace the buffer of a response that has begun, unless it can have no body."""
        if type(content) is StreamReader:
            content.__class__ = cls
            content._http_chunk_splits = None  # noqa: SLF001 - see above

    def take(self) -> bytes | None:
        """All that is buffered; `None` at the end. Raises `BodyBroken`."""
        buffer = self._buffer
        if not buffer:
            if self._exception is not None:
                raise BodyBroken(cast("aiohttp.ClientError", self._exception))
            return None if self._eof else b""
        data = buffer[0] if len(buffer) == 1 else b"".join(buffer)
        buffer.clear()
        self._size = 0
        if self._protocol._reading_paused:  # noqa: SLF001 - see above
            self._protocol.resume_reading()  # may parse more, and pause again
        return data


class StreamedBody:
    """A body that is streamed in the callback of its connection: no future and no task to wake for a read."""

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        on_data: Callable[[bytes], bool],
        after_read: Callable[["StreamedBody"], None],
    ) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._content = cast("_BodyBuffer", response.content)
        self._on_data = on_data
        self._after_read = after_read
        self._handler: BoundedHandler | None = None
        self._delivering = False
        if response.connection is not None:  # None: the whole body was received with the head
            assert isinstance(response.connection.protocol, BoundedHandler)  # noqa: S101 - from a bounded session
            self._handler = response.connection.protocol
            self._handler.body = self
        self.deliver()  # data received with the head

    def detach(self) -> None:
        """Leave the rest of the body to aiohttp."""
        # Exceptions, also those that aiohttp keeps, have tracebacks with our frames, which would keep the answer alive.
        del self.ended, self._on_data, self._after_read
        self._leave()

    def _leave(self) -> None:
        handler = self._handler
        if handler is not None and handler.body is self:
            handler.body = None
            handler.release()

    def pause(self) -> None:
        """Deliver nothing until `resume`."""
        if self._handler is not None:
            self._handler.hold()

    def resume(self) -> None:
        """Deliver the data received meanwhile, and call `after_read`, which may pause again."""
        if self._handler is not None:
            self._handler.release()

    def deliver(self) -> None:
        """Called by the connection after it has parsed received data."""
        if self._delivering or self.ended.done():
            return
        self._delivering = True
        try:
            if self._deliver_buffered():
                self._after_read(self)
            else:
                self._leave()
                self.ended.set_result(None)
        except Exception as error:  # noqa: BLE001 - raised by `stream_body`
            self._leave()
            self.ended.set_exception(error)
        finally:
            self._delivering = False

    def _deliver_buffered(self) -> bool:
        """Deliver the received data; return whether there may be more."""
        while data := self._content.take():
            if not self._on_data(data):
                return False
        if data is None:
            self._on_data(b"")
            return False
        if self._handler is None or self._handler.transport is None:
            raise BodyBroken(aiohttp.ClientPayloadError())  # aiohttp does not notify the body if it closes a connection
        return True


async def stream_body(
    response: aiohttp.ClientResponse,
    on_data: Callable[[bytes], bool],
    after_read: Callable[[StreamedBody], None] = lambda _: None,
) -> None:
    """Call `on_data` with each part of the body as soon as it is received, and with `b""` at its end.

    `on_data` returns whether it takes more; the rest can be read from `response.content`. `after_read` is called after
    what was read together, unless the body has ended; it may pause the connection. Raises `BodyBroken` if the
    connection is lost or the body is not valid HTTP, and what `on_data` raises.
    """
    if response.content is EMPTY_PAYLOAD:  # the response can have no body
        on_data(b"")
        return
    body = StreamedBody(response, on_data, after_read)
    try:
        await body.ended
    finally:
        body.detach()
