"""A small HTTP/1.1 server that leaves every byte of an answer to its user.

All that stands in for an AI backend is built on it: the demo, the backend of the benchmark, the scripted backend of the
tests. httptools parses the requests.
"""
# ruff: noqa: D102 - what the event loop and the parser call is described by them

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from typing import Any, Generic, Literal, TypeVar, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

MAX_BODY = 8 * 1024 * 1024
"""Maximum size of a request's body, in bytes."""

Framing = Literal["chunked", "close"] | int
"""How the end of a body is marked: by chunks, by closing the connection, or by its length in bytes."""

LAST_CHUNK = b"0\r\n\r\n"

_BACKLOG = 2048
KEEP_ALIVE = 75
"""Seconds an idle connection is kept: longer than clients do, so that it is they who close."""
_PHRASES = {status.value: status.phrase for status in HTTPStatus}


def event(data: bytes) -> bytes:
    """One server-sent event."""
    return b"data: %b\n\n" % data


def chunked(data: bytes) -> bytes:
    """One chunk of a body; nothing without data, because an empty chunk is the last one."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def head(status: int, content_type: str, framing: Framing, headers: Mapping[str, str] | None = None) -> bytes:
    """The status line and the headers of an answer."""
    end = {"chunked": "Transfer-Encoding: chunked", "close": "Connection: close"}.get(str(framing))
    lines = [
        f"HTTP/1.1 {status} {_PHRASES.get(status, '')}",
        f"Content-Type: {content_type}",
        end or f"Content-Length: {framing}",
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode()


class HttpConnection(asyncio.Protocol):
    """One connection of a client, with the request on it that is being answered.

    Attributes:
        number: Which connection of its server it is, from 0.
        closed_by_peer: When the client closed it, on the loop's clock; cancelled when this side did.
        headers: Headers of the request, as they came.
        body: Body of the request; incomplete if it is longer than `MAX_BODY`.
    """

    def __init__(self, server: HttpServer[Any]) -> None:
        self.number = server.accepted
        self.closed_by_peer: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport
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
        await self.raw(head(status, content_type, framing, headers))

    async def send(self, *parts: bytes) -> None:
        """Send parts of the body, each by itself."""
        for part in parts:
            await self.raw(chunked(part) if self._framing == "chunked" else part)

    async def end(self, last: bytes = b"") -> None:
        """Send the last part of the body, and end it as its framing wants it."""
        await self.raw(chunked(last) + LAST_CHUNK if self._framing == "chunked" else last)
        if self._framing == "close":
            self.drop()

    async def raw(self, data: bytes) -> None:
        """Send bytes as they are; wait while the client reads too slowly.

        Raises:
            ConnectionResetError: The connection is closed.
        """
        if self.transport.is_closing():
            raise ConnectionResetError
        self.transport.write(data)
        await self._writable.wait()

    def drop(self) -> None:
        """Close the connection in an orderly way (FIN), whether the body is complete or not."""
        self.transport.close()

    def done(self) -> None:
        """The request is answered; the next one may be."""
        self._answering = False
        if not self._keep_alive:
            self.drop()
        if not self.transport.is_closing():
            self._idle = asyncio.get_running_loop().call_later(KEEP_ALIVE, self.drop)
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
        self._idle = asyncio.get_running_loop().call_later(KEEP_ALIVE, self.drop)
        self._server.accepted += 1
        self._server.connections.add(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade:
            pass  # no other protocol is spoken; the request is answered as if it had not asked for one
        except HttpParserError:
            self.transport.write(head(400, "text/plain", "close") + b"Invalid HTTP request received.")
            self.drop()
        if self._requests and self._answering:
            self.transport.pause_reading()  # what is asked ahead of its turn waits
        self._begin()

    def eof_received(self) -> None:
        if not self.closed_by_peer.done():
            self.closed_by_peer.set_result(asyncio.get_running_loop().time())

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self.eof_received()
        self.closed_by_peer.cancel()  # if it is not set by now, it was this side
        self._idle.cancel()
        self.resume_writing()
        self._server.connections.remove(self)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def on_message_begin(self) -> None:
        self._target = ""
        self._headers: list[tuple[bytes, bytes]] = []
        self._body = bytearray()

    def on_url(self, part: bytes) -> None:
        self._target += part.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))
        if name.lower() == b"expect":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, part: bytes) -> None:
        if len(self._body) <= MAX_BODY:
            self._body += part

    def on_message_complete(self) -> None:
        method, keep_alive = self._parser.get_method().decode(), self._parser.should_keep_alive()
        self._requests.append((method, self._target, self._headers, self._body, keep_alive))


C = TypeVar("C", bound=HttpConnection)


class HttpServer(Generic[C]):
    """Has each request answered by a coroutine, or by a function that has `HttpConnection.done` called in the end.

    Attributes:
        accepted: Number of connections so far.
        connections: Those that are open.
    """

    def __init__(self, kind: type[C], answer: Callable[[C], Coroutine[Any, Any, None] | None]) -> None:
        self.accepted = 0
        self.connections: set[HttpConnection] = set()
        self._kind = kind
        self._answer = answer
        self._tasks: dict[asyncio.Task[None], C] = {}

    @asynccontextmanager
    async def listening(self, host: str, port: int, *, grace: float = 0) -> AsyncIterator[tuple[str, int]]:
        """Serve for as long as the context lasts; answers that are running then get `grace` seconds.

        Yields:
            The address.

        Raises:
            OSError: The address cannot be listened on.
        """
        listener = socket.create_server((host, port))
        # Accepted connections inherit it. asyncio sets it only on sockets whose protocol number says TCP, which this
        # one's does not: each answer would wait 40 ms for an acknowledgement (uvloop sets it always).
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: self._kind(self), sock=listener, backlog=_BACKLOG)
        try:
            yield listener.getsockname()[:2]
        finally:
            server.close()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=grace)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for connection in self.connections:
                connection.transport.abort()
            await server.wait_closed()

    def begin(self, connection: C) -> None:
        """Have the request on a connection answered."""
        answering = self._answer(connection)
        if answering is not None:
            task = asyncio.get_running_loop().create_task(answering)
            self._tasks[task] = connection
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        connection = self._tasks.pop(task)
        if not task.cancelled() and task.exception() is None:
            return connection.done()
        connection.drop()
        with suppress(ConnectionError, asyncio.CancelledError):  # the client left, or the server ends
            task.result()
        return None
