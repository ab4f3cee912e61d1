"""An AI backend whose every byte is written by the test, over a real socket: for what real servers do rarely.

    async with scripted_backend() as backend:
        backend.then(streams("Hel", "lo"))             # the next request is answered
        backend.then(refuses(503, "come back later"))  # the one after it is not
        ...                                            # point a client at backend.url
        assert backend.requests[0].json["stream"] is True

A script is an async function of one `Exchange`, so a test can also write its own. Each request takes the next script;
when none is left, the one given as `always`. A request without any script fails the test.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal

from tests.support.waiting import SLOW

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LIMIT = 5.0 * SLOW
"""Seconds that a test waits for one thing at most."""

Framing = Literal["chunked", "close"] | int
"""How a body's end is told: by chunks, by closing the connection, or by its length in bytes."""

DONE = b"data: [DONE]\n\n"


def event(value: object) -> bytes:
    """One server-sent event that carries JSON."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def chunk(text: str | None = None, *, finish_reason: str | None = None, **fields: object) -> dict[str, Any]:
    """One `chat.completion.chunk`, with or without text."""
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "scripted", "choices": [choice], **fields}


def usage_chunk(**counts: object) -> dict[str, Any]:
    """The chunk without choices that tells how many tokens were used."""
    return {**chunk(), "choices": [], "usage": counts}


class _Connection(asyncio.StreamReaderProtocol):
    """Writes down when the client closed the connection."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    ) -> None:
        super().__init__(reader, serve)
        self.closed_by_peer: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def eof_received(self) -> bool | None:
        self._note()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self._note()
        self.closed_by_peer.cancel()  # if it is not set by now, it was this side
        super().connection_lost(exc)

    def _note(self) -> None:
        if not self.closed_by_peer.done():
            self.closed_by_peer.set_result(asyncio.get_running_loop().time())


@dataclass
class Request:
    """One request as it came.

    Attributes:
        connection: Number of the connection that it came over, from 0.
        received_at: When all of it was there, on the loop's clock.
    """

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes
    connection: int
    received_at: float
    _closed: asyncio.Future[float] = field(repr=False)

    @property
    def json(self) -> Any:  # noqa: ANN401 - JSON
        """The body, decoded."""
        return json.loads(self.body)

    @property
    def closed_by_peer_at(self) -> float | None:
        """When the client closed this connection, on the loop's clock; None while it has not."""
        return self._closed.result() if self._closed.done() and not self._closed.cancelled() else None

    async def gone(self) -> float:
        """Wait until the client closes this connection; when it did, on the loop's clock.

        Raises:
            ConnectionAbortedError: This side closed it.
        """
        async with asyncio.timeout(LIMIT):
            await asyncio.wait([self._closed])
        if self._closed.cancelled():
            raise ConnectionAbortedError
        return self._closed.result()


class Exchange:
    """One request and the server's side of answering it."""

    def __init__(self, request: Request, writer: asyncio.StreamWriter) -> None:
        self.request = request
        self._writer = writer
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
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"Content-Type: {content_type}"]
        match framing:
            case "chunked":
                lines.append("Transfer-Encoding: chunked")
            case "close":
                lines.append("Connection: close")
            case length:
                lines.append(f"Content-Length: {length}")
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        await self.raw("\r\n".join([*lines, "", ""]).encode())

    async def send(self, *parts: bytes) -> None:
        """Send parts of the body, each by itself: the client reads it before the next one goes out."""
        for part in parts:
            await self.raw(b"%x\r\n%b\r\n" % (len(part), part) if self._framing == "chunked" else part)

    async def raw(self, data: bytes) -> None:
        """Send bytes as they are, and give the client time to read them.

        Raises:
            ConnectionError: The connection is closed. A script that lets it pass has ended in order.
        """
        if self._writer.is_closing():
            raise ConnectionResetError
        self._writer.write(data)
        await self._writer.drain()
        for _ in range(4):  # turns of the loop: one to see the socket readable, the others to wake who waits for it
            await asyncio.sleep(0)

    async def end(self) -> None:
        """End the body as its framing wants it."""
        if self._framing == "chunked":
            await self.raw(b"0\r\n\r\n")
        elif self._framing == "close":
            self._writer.close()

    def drop(self) -> None:
        """Close the connection in an orderly way (FIN), whether the body is complete or not."""
        self._writer.close()

    def half_close(self) -> None:
        """Say that nothing more will come, and leave it to the client to close the connection."""
        self._writer.write_eof()

    def reset(self) -> None:
        """Break the connection (RST)."""
        sock = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def gone(self) -> float:
        """Wait until the client closes the connection; when it did, on the loop's clock."""
        return await self.request.gone()


Script = Callable[[Exchange], Awaitable[None]]


def streams(*texts: str, usage: Mapping[str, int] | None = None, framing: Framing = "chunked") -> Script:
    """A script: a whole answer, one event for each text."""

    async def script(exchange: Exchange) -> None:
        events = [event(chunk(text)) for text in texts] + [event(chunk(finish_reason="stop"))]
        if usage is not None:
            events.append(event(usage_chunk(**usage)))
        await exchange.start(framing=framing)
        await exchange.send(*events, DONE)
        await exchange.end()

    return script


def says(
    *parts: bytes,
    content_type: str = "text/event-stream",
    framing: Framing = "chunked",
    headers: Mapping[str, str] | None = None,
) -> Script:
    """A script: status 200 and these parts of a body."""

    async def script(exchange: Exchange) -> None:
        await exchange.start(content_type=content_type, framing=framing, headers=headers)
        await exchange.send(*parts)
        await exchange.end()

    return script


def refuses(
    status: int, body: str = "", *, content_type: str = "application/json", headers: Mapping[str, str] | None = None
) -> Script:
    """A script: an error status."""

    async def script(exchange: Exchange) -> None:
        data = body.encode()
        await exchange.start(status, content_type=content_type, framing=len(data), headers=headers)
        await exchange.send(data)

    return script


def hangs(*parts: bytes, head: bool = True) -> Script:
    """A script: these parts of a body, and then nothing until the client has gone."""

    async def script(exchange: Exchange) -> None:
        if head:
            await exchange.start()
        await exchange.send(*parts)
        await exchange.gone()

    return script


class ScriptedBackend:
    """Accepts connections and answers each request by the next script."""

    def __init__(self, always: Script | None = None) -> None:
        self.port = 0
        self.requests: list[Request] = []
        self.connections = 0
        self.problems: list[Exception] = []
        """What went wrong in a script."""
        self._always = always
        self._scripts: deque[Script] = deque()
        self._arrived = asyncio.Event()
        self._serving: dict[asyncio.Task[object], asyncio.StreamWriter] = {}

    @property
    def url(self) -> str:
        """The base URL, as clients take it."""
        return f"http://127.0.0.1:{self.port}/v1"

    def then(self, *scripts: Script) -> None:
        """Answer the next requests by these scripts."""
        self._scripts.extend(scripts)

    async def request(self, number: int = 0) -> Request:
        """Wait until that many requests, and one, have come; the last of them."""
        async with asyncio.timeout(LIMIT):
            while len(self.requests) <= number:
                self._arrived.clear()
                await self._arrived.wait()
        return self.requests[number]

    def connection(self) -> _Connection:
        """Make the protocol of one new connection."""
        return _Connection(asyncio.StreamReader(), self._serve)

    async def close(self) -> None:
        """Close all connections, and see every script end."""
        for writer in self._serving.values():
            writer.transport.abort()
        if self._serving:
            await asyncio.wait(self._serving, timeout=LIMIT)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = self.connections
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._serving[task] = writer
        try:
            while (request := await self._receive(reader, writer, connection)) is not None:
                self.requests.append(request)
                self._arrived.set()
                script = self._scripts.popleft() if self._scripts else self._always
                assert script is not None, f"no script for request {len(self.requests)}"
                await script(Exchange(request, writer))
                if writer.is_closing():
                    return
        except ConnectionError:
            return  # the client went first, or the script broke the connection
        except Exception as problem:  # noqa: BLE001 - told to the test at its end
            self.problems.append(problem)
        finally:
            del self._serving[task]
            writer.close()

    @staticmethod
    async def _receive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: int) -> Request | None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            line, *fields = head.removesuffix("\r\n\r\n").split("\r\n")
            method, target, _ = line.split(" ")
            headers = {name.lower(): value.strip() for name, _, value in (text.partition(":") for text in fields)}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
        except asyncio.IncompleteReadError:
            return None
        protocol = writer.transport.get_protocol()
        assert isinstance(protocol, _Connection)
        now = asyncio.get_running_loop().time()
        return Request(method, target, headers, body, connection, now, protocol.closed_by_peer)


@asynccontextmanager
async def scripted_backend(always: Script | None = None) -> AsyncIterator[ScriptedBackend]:
    """A backend on a free port of 127.0.0.1. Fails at its end if a script did."""
    backend = ScriptedBackend(always)
    server = await asyncio.get_running_loop().create_server(backend.connection, "127.0.0.1", 0)
    backend.port = server.sockets[0].getsockname()[1]
    try:
        yield backend
    finally:
        server.close()
        await backend.close()
        await server.wait_closed()
    if backend.problems:
        raise ExceptionGroup("scripts of the backend failed", backend.problems)
