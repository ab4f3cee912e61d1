"""An AI backend whose bytes the test writes, over a real socket, for rare behaviour of real servers.

    async with scripted_backend() as backend:
        backend.then(streams("Hel", "lo"))             # the next request is answered
        backend.then(refuses(503, "come back later"))  # the one after it is not
        ...                                            # point a client at backend.url
        assert backend.requests[0].json["stream"] is True

A script is an async function of one `Exchange`, so a test can write its own. Each request uses the next script, or
`always` when none remains. A request without a script fails the test.
"""

import asyncio
import json
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from ops import http_server
from tests.support.waiting import SLOW

LIMIT = 5.0 * SLOW
"""Maximum wait of a test in seconds."""

Framing = http_server.Framing

DONE = http_server.event(b"[DONE]")


def event(value: object) -> bytes:
    """One server-sent event with JSON."""
    return http_server.event(json.dumps(value, ensure_ascii=False).encode())


def chunk(text: str | None = None, *, finish_reason: str | None = None, **fields: object) -> dict[str, Any]:
    """One `chat.completion.chunk`, with or without text."""
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "scripted", "choices": [choice], **fields}


def usage_chunk(**counts: object) -> dict[str, Any]:
    """The chunk without choices that reports the token usage."""
    return {**chunk(), "choices": [], "usage": counts}


@dataclass
class Request:
    """One request as received.

    Attributes:
        connection: Number of its connection, from 0.
        received_at: When it was complete, on the loop's clock.
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
        """When the client closed this connection, on the loop's clock; None before."""
        return self._closed.result() if self._closed.done() and not self._closed.cancelled() else None

    async def gone(self) -> float:
        """Wait until the client closes this connection, and return the time on the loop's clock.

        Raises:
            ConnectionAbortedError: The server closed it.
        """
        async with asyncio.timeout(LIMIT):
            await asyncio.wait([self._closed])
        if self._closed.cancelled():
            raise ConnectionAbortedError
        return self._closed.result()


class Exchange(http_server.HttpConnection):
    """One request and the server's side of answering it."""

    request: Request

    async def write(self, data: bytes) -> None:
        """Send bytes as they are, and give the client time to read them.

        Raises:
            ConnectionError: The connection is closed. Scripts may let this exception end them.
        """
        await super().write(data)
        for _ in range(4):  # ticks of the loop: one to see the socket readable, the others to wake the reader
            await asyncio.sleep(0)

    def half_close(self) -> None:
        """Close the sending side, so that the client closes the connection."""
        self.transport.write_eof()

    def reset(self) -> None:
        """Break the connection (RST)."""
        sock = self.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    async def gone(self) -> float:
        """Wait until the client closes the connection, and return the time on the loop's clock."""
        return await self.request.gone()


Script = Callable[[Exchange], Awaitable[None]]


def streams(*texts: str, usage: Mapping[str, int] | None = None, framing: Framing = "chunked") -> Script:
    """A script: a complete answer with one event per text."""

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
    """A script: these parts of a body, then silence until the client disconnects."""

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
        self.models: Script | None = says(b'{"data": []}', content_type="application/json")
        """Answers requests for the list of models, which are not among `requests`. None: they are as the others."""
        self.requests: list[Request] = []
        self.problems: list[Exception] = []
        """Exceptions of scripts."""
        self.server = http_server.HttpServer(Exchange, self._serve)
        self._always = always
        self._scripts: deque[Script] = deque()
        self._arrived = asyncio.Event()

    @property
    def url(self) -> str:
        """The base URL for clients."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def connections(self) -> int:
        """Number of connections so far."""
        return self.server.accepted

    def then(self, *scripts: Script) -> None:
        """Use these scripts for the next requests."""
        self._scripts.extend(scripts)

    async def request(self, number: int = 0) -> Request:
        """Wait for the request with this index, and return it."""
        async with asyncio.timeout(LIMIT):
            while len(self.requests) <= number:
                self._arrived.clear()
                await self._arrived.wait()
        return self.requests[number]

    async def _serve(self, exchange: Exchange) -> None:
        now = asyncio.get_running_loop().time()
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in exchange.headers}
        exchange.request = Request(
            *(exchange.method, exchange.target, headers, bytes(exchange.body)),
            *(exchange.number, now, exchange.closed_by_peer),
        )
        if exchange.method == "GET" and self.models is not None:  # of the check at the start of a node
            await self.models(exchange)
            return
        self.requests.append(exchange.request)
        self._arrived.set()
        try:
            script = self._scripts.popleft() if self._scripts else self._always
            assert script is not None, f"no script for request {len(self.requests)}"
            await script(exchange)
        except ConnectionError:
            raise  # the client disconnected, or the script broke the connection
        except Exception as problem:  # noqa: BLE001 - raised at the end of the test
            self.problems.append(problem)
            exchange.close()


@asynccontextmanager
async def scripted_backend(always: Script | None = None, *, port: int = 0) -> AsyncIterator[ScriptedBackend]:
    """Run a backend on a port of 127.0.0.1, by default a free one. Fails at the end if a script failed."""
    backend = ScriptedBackend(always)
    async with backend.server.listening("127.0.0.1", port, grace=LIMIT) as (_, backend.port):
        try:
            yield backend
        finally:
            for connection in backend.server.connections:
                connection.transport.abort()
    if backend.problems:
        raise ExceptionGroup("scripts of the backend failed", backend.problems)
