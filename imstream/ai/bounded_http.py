"""HTTP connections to untrusted servers: every response is bounded, and its body is delivered where it arrives.

aiohttp bounds each header field and their number (8190 bytes, 128), but neither interim responses (1xx) nor bytes that
belong to no request. It also reads as much as the kernel has: several megabytes in one turn of the event loop.

The only file that uses private names of aiohttp (`TCPConnector._factory`, `ResponseHandler._payload` and `_buffer`,
`StreamReader._protocol` and `_read_nowait`). They buy the bounds, for which aiohttp has no hook, and with `stream_body`
5 to 8 % of a node's CPU under paced answers. tests/unit/test_private_names.py checks them.
"""

import asyncio
import socket
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Protocol, cast

import aiohttp
from aiohappyeyeballs import AddrInfoType
from aiohttp import StreamReader
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

HEAD_LIMIT = 32 * 1024  # bytes of the head of a response, including all interim responses before it
OVERHEAD_LIMIT = 512 * 1024  # bytes of a response that are not body, such as chunk sizes, beyond the size of its body
RECEIVE_BUFFER = 32 * 1024  # bytes; bounds what is parsed in one turn of the event loop
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
    """aiohttp's protocol of one connection, with limits for each response.

    It also aborts a connection that receives a response without a request, which aiohttp would take for the response to
    the next request.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, *, limit: int) -> None:
        super().__init__(loop)
        self.unchecked = 0  # bytes that may be received before the limits are checked again
        self._limit = limit
        self._head_remaining = 0
        self._allowed = 0

    def set_response_params(self, **params: Any) -> None:  # noqa: ANN401 - passed through
        """Called by aiohttp before it sends a request."""
        if len(self):
            self._buffer.clear()
            self._abort()
        self._head_remaining = HEAD_LIMIT
        self.unchecked = self._allowed = OVERHEAD_LIMIT
        super().set_response_params(**params)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop, and by aiohttp (without data) to parse what it has buffered."""
        payload = self._payload
        if payload is None or payload.is_eof():
            self._receive_head(data)
            return
        self.unchecked -= len(data)
        if self.unchecked < 0 and not self._within_limits(payload):
            self._abort()
            return
        super().data_received(data)

    def _within_limits(self, payload: StreamReader) -> bool:
        """Check the limits of a response; called occasionally, not for each read."""
        received = self._allowed - self.unchecked
        allowed = min(self._limit, OVERHEAD_LIMIT + 2 * payload.total_bytes)
        if received <= allowed:
            self._allowed, self.unchecked = allowed, allowed - received
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


def is_encoded(response: aiohttp.ClientResponse) -> bool:
    """Whether the body has a content encoding, although `identity` was requested."""
    codings = ",".join(response.headers.getall("Content-Encoding", ())).split(",")
    return any(coding.strip().lower() not in {"", "identity"} for coding in codings)


class Pausable(Protocol):
    """A body that is streamed. `resume` is called once after each `pause`, or never."""

    def pause(self) -> None:
        """Deliver nothing but the end. aiohttp buffers what is received, and pauses the connection at its limit."""
        ...

    def resume(self) -> None:
        """Deliver what was received, and go on."""
        ...


async def stream_body(
    response: aiohttp.ClientResponse,
    on_data: Callable[[bytes], bool],
    after_read: Callable[[Pausable], None] = lambda _: None,
) -> None:
    """Call `on_data` with each part of the body as soon as it is received, and with `b""` at its end.

    `on_data` returns whether it takes more; the rest can be read from `response.content`. `after_read` is called after
    what was read together, unless the body has ended; it may pause the connection. Raises `BodyBroken` if the
    connection is lost or the body is not valid HTTP, and what `on_data` raises.
    """
    body = _StreamedBody(response, on_data, after_read)
    try:
        await body.ended
    finally:
        body.detach()


class _StreamedBody(asyncio.Protocol):
    """Delivers a body in the callback of its connection: no future, no turn of the loop, no task to wake for a read.

    Until `detach` it replaces aiohttp's protocol on both of its sides. As protocol of the transport it lets
    aiohttp parse what is received, and delivers the result. As protocol of the body it ignores the requests to resume
    reading: after each read, aiohttp 3.14 would parse again and resume a transport that is not paused.
    """

    _handler: BoundedHandler

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        on_data: Callable[[bytes], bool],
        after_read: Callable[[Pausable], None],
    ) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._content = response.content
        self._on_data = on_data
        self._after_read = after_read
        self._transport: asyncio.Transport | None = None
        self._held = self._lost = False
        self._paused = True  # aiohttp may have paused reading, or buffered data that it has not parsed
        self._connected = response.connection is not None
        if response.connection is not None:  # None: the whole body was received with the head
            assert isinstance(response.connection.protocol, BoundedHandler)  # noqa: S101 - from a bounded session
            self._handler = response.connection.protocol
            self._transport = response.connection.transport
            self._lost = self._transport is None
        if self._transport is not None:
            self._transport.set_protocol(self)
            self._content._protocol = self  # type: ignore[assignment] # noqa: SLF001 - see above
        self._deliver()  # what was received with the head

    def detach(self) -> None:
        # Exceptions, also those that aiohttp keeps, have tracebacks with our frames, which would keep the answer alive.
        del self.ended, self._on_data, self._after_read
        self._held = False
        if self._transport is not None:
            self._content._protocol = self._handler  # noqa: SLF001 - see above
            if self._transport.get_protocol() is self:
                self._transport.set_protocol(self._handler)
            self._resume()

    def data_received(self, data: bytes) -> None:
        handler = self._handler
        if len(data) <= handler.unchecked:
            handler.unchecked -= len(data)
            ResponseHandler.data_received(handler, data)  # skips the check
        else:
            handler.data_received(data)
        if not self._held or self._content.is_eof():
            self._deliver()

    def pause(self) -> None:
        """See `Pausable`. To pause the transport would cost more system calls than it saves."""
        self._held = True

    def resume(self) -> None:
        """See `Pausable`."""
        if self._held:
            self._held = False
            self._deliver()

    def eof_received(self) -> None:
        self._handler.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._handler.connection_lost(exc)
        self._lost = True
        self._deliver()

    def pause_writing(self) -> None:
        self._handler.pause_writing()

    def resume_writing(self) -> None:
        self._handler.resume_writing()

    def pause_reading(self) -> None:
        self._paused = True
        self._handler.pause_reading()

    def resume_reading(self, **_: bool) -> None:
        """Called by the body after each read. Reading is resumed when all of its buffer was delivered."""

    def _resume(self) -> None:
        was_paused, self._paused = self._paused, False
        if was_paused and self._connected:
            self._handler.resume_reading()  # may parse buffered data, and pause again

    def _deliver(self) -> None:
        try:
            if not self.ended.done():
                if self._deliver_buffered():
                    self._after_read(self)
                else:
                    self.ended.set_result(None)
        except Exception as error:  # noqa: BLE001 - raised by `stream_body`
            self.ended.set_exception(error)

    def _deliver_buffered(self) -> bool:
        """Deliver what was received; return whether there may be more."""
        content = self._content
        while True:
            try:
                data = content.read_nowait()
            except (aiohttp.ClientError, OSError) as error:
                if not (data := content._read_nowait(-1)):  # noqa: SLF001 - what was received before the error
                    raise BodyBroken(error) from None
            if data and not self._on_data(data):
                return False
            if not self._paused:
                break
            self._resume()
        if content.is_eof():
            self._on_data(b"")
            return False
        if self._lost:  # aiohttp does not notify the body when it closes the connection itself
            raise BodyBroken(aiohttp.ClientPayloadError())
        return True
