"""A small HTTP/1.1 server that lets its user write every byte of a response. httptools parses the requests.

The backend of the benchmark and the scripted backend of the tests use it.
"""
# ruff: noqa: D102 - the callbacks of asyncio and httptools are described there

import asyncio
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from typing import Any, Generic, Literal, TypeVar, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

MAX_BODY = 8 * 1024 * 1024  # bytes of a request body; the rest is not kept

Framing = Literal["chunked", "close"] | int
"""How a body ends: with a last chunk, with the connection, or after a number of bytes."""

LAST_CHUNK = b"0\r\n\r\n"

KEEP_ALIVE = 75  # seconds that an idle connection is kept: longer than clients do, so that clients close first
_BACKLOG = 2048
_PHRASES = {status.value: status.phrase for status in HTTPStatus}


def event(data: bytes) -> bytes:
    """One server-sent event."""
    return b"data: %b\n\n" % data


def chunked(data: bytes) -> bytes:
    """One chunk of a body; empty without data, because an empty chunk is the last one."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def head(status: int, content_type: str, framing: Framing, headers: Mapping[str, str] | None = None) -> bytes:
    """The status line and the headers of a response."""
    end = {"chunked": "Transfer-Encoding: chunked", "close": "Connection: close"}.get(str(framing))
    lines = [
        f"HTTP/1.1 {status} {_PHRASES.get(status, '')}",
        f"Content-Type: {content_type}",
        end or f"Content-Length: {framing}",
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode()


class HttpConnection(asyncio.Protocol):
    """A connection of a client, and the request on it that is being answered (`method`, `target`, `headers`, `body`).

    Attributes:
        number: Number of the connection on its server, from 0.
        closed_by_peer: The loop time at which the client closed it; cancelled if the server did.
    """

    transport: asyncio.Transport

    def __init__(self, server: "HttpServer[Any]") -> None:
        self.number = server.accepted
        self.closed_by_peer: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._server = server
        self._parser = HttpRequestParser(self)
        self._answering = False
        self._keep_alive = True
        self._requests: deque[tuple[str, str, list[tuple[bytes, bytes]], bytearray, bool]] = deque()
        self._writable = asyncio.Event()
        self._framing: Framing = "chunked"

    async def start(
        self,
        status: int = 200,
        *,
        headers: Mapping[str, str] | None = None,
        content_type: str = "text/event-stream",
        framing: Framing = "chunked",
    ) -> None:
        """Send the status line and the headers."""
        self._framing = framing
        await self.write(head(status, content_type, framing, headers))

    async def send(self, *parts: bytes) -> None:
        """Send parts of the body, each in its own write and chunk."""
        for part in parts:
            await self.write(chunked(part) if self._framing == "chunked" else part)

    async def end(self, last: bytes = b"") -> None:
        """Send the last part of the body, and end it."""
        await self.write(chunked(last) + LAST_CHUNK if self._framing == "chunked" else last)
        if self._framing == "close":
            self.close()

    async def write(self, data: bytes) -> None:
        """Send bytes as they are; wait while the client reads too slowly. Raises `ConnectionResetError` if closed."""
        if self.transport.is_closing():
            raise ConnectionResetError
        self.transport.write(data)
        await self._writable.wait()

    def close(self) -> None:
        """Close the connection (FIN), whether the body is complete or not."""
        self.transport.close()

    def finish(self) -> None:
        """The request is answered: begin with the next one."""
        self._answering = False
        if not self._keep_alive:
            self.close()
        if not self.transport.is_closing():
            self._idle = asyncio.get_running_loop().call_later(KEEP_ALIVE, self.close)
            self._begin()

    def _begin(self) -> None:
        if self._requests and not self._answering and not self.transport.is_closing():
            self._answering = True
            self._idle.cancel()
            self.method, self.target, self.headers, self.body, self._keep_alive = self._requests.popleft()
            self.transport.resume_reading()
            self._server.begin(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.resume_writing()
        self._idle = asyncio.get_running_loop().call_later(KEEP_ALIVE, self.close)
        self._server.accepted += 1
        self._server.connections.add(self)
        if self._server.is_closed:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade:
            pass  # answered as if no upgrade was requested
        except HttpParserError:
            self.transport.write(head(400, "text/plain", "close") + b"Invalid HTTP request received.")
            self.close()
        if self._requests and self._answering:
            self.transport.pause_reading()  # bounds pipelined requests
        self._begin()

    def eof_received(self) -> None:
        if not self.closed_by_peer.done():
            self.closed_by_peer.set_result(asyncio.get_running_loop().time())

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self.eof_received()
        self.closed_by_peer.cancel()  # no effect if it has a result
        self._idle.cancel()
        self.resume_writing()
        self._server.connections.remove(self)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def on_message_begin(self) -> None:
        self._next_target = ""
        self._next_headers: list[tuple[bytes, bytes]] = []
        self._next_body = bytearray()

    def on_url(self, part: bytes) -> None:
        self._next_target += part.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._next_headers.append((name, value))
        if name.lower() == b"expect":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, part: bytes) -> None:
        if len(self._next_body) <= MAX_BODY:
            self._next_body += part

    def on_message_complete(self) -> None:
        method, keep_alive = self._parser.get_method().decode(), self._parser.should_keep_alive()
        self._requests.append((method, self._next_target, self._next_headers, self._next_body, keep_alive))


C = TypeVar("C", bound=HttpConnection)


class HttpServer(Generic[C]):
    """Answers each request with a coroutine, or with a function that has `HttpConnection.finish` called later.

    Attributes:
        accepted: Number of connections so far.
        connections: The open connections.
        is_closed: Whether it accepts no more connections. One that was being accepted may still arrive.
    """

    def __init__(self, connection: type[C], answer: Callable[[C], Coroutine[Any, Any, None] | None]) -> None:
        self.accepted = 0
        self.connections: set[HttpConnection] = set()
        self.is_closed = False
        self._connection = connection
        self._answer = answer
        self._tasks: dict[asyncio.Task[None], C] = {}

    @asynccontextmanager
    async def listening(self, host: str, port: int, *, grace: float = 0) -> AsyncIterator[tuple[str, int]]:
        """Serve while the context is open; yield the address. Running answers then have `grace` seconds to end."""
        listener = socket.create_server((host, port))
        # Inherited by accepted connections. asyncio sets it only on sockets whose protocol number is TCP, which this
        # one's is not: each response would wait 40 ms for an acknowledgement (uvloop always sets it).
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: self._connection(self), sock=listener, backlog=_BACKLOG)
        try:
            yield listener.getsockname()[:2]
        finally:
            server.close()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=grace)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self.is_closed = True
            for connection in self.connections:
                connection.transport.abort()
            await server.wait_closed()

    def begin(self, connection: C) -> None:
        """Start to answer the request of a connection."""
        answering = self._answer(connection)
        if answering is not None:
            task = asyncio.get_running_loop().create_task(answering)
            self._tasks[task] = connection
            task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        connection = self._tasks.pop(task)
        if not task.cancelled() and task.exception() is None:
            connection.finish()
            return
        connection.close()
        with suppress(ConnectionError, asyncio.CancelledError):  # the client has closed it, or the server stops
            task.result()
