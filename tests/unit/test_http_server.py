"""The HTTP server of the stand-ins for an AI backend, over raw sockets."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from ops import http_server
from ops.http_server import HttpConnection, HttpServer

GET = b"GET /%b HTTP/1.1\r\nHost: here\r\n\r\n"


class Echo(HttpConnection):
    """Repeats the request."""

    async def answer(self) -> None:
        """Answer; `/slow` is delayed and `/error` raises."""
        if self.target == "/error":
            raise RuntimeError("as it was asked to")
        if self.target == "/slow":
            await asyncio.sleep(0.05)
        body = f"{self.method} {self.target} {len(self.body)};".encode()
        await self.start(framing=len(body))
        await self.end(body)


@asynccontextmanager
async def connected(grace: float = 0) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    async with HttpServer(Echo, Echo.answer).listening("127.0.0.1", 0, grace=grace) as (host, port):
        reader, writer = await asyncio.open_connection(host, port)
        yield reader, writer
    writer.close()


async def answers(reader: asyncio.StreamReader, count: int) -> list[str]:
    """The bodies of the next responses."""
    async with asyncio.timeout(5):
        return [(await reader.readuntil(b";")).rpartition(b"\r\n")[2].decode() for _ in range(count)]


async def rest(reader: asyncio.StreamReader) -> bytes:
    """Everything until the server closes the connection."""
    async with asyncio.timeout(5):
        return await reader.read()


async def test_requests_that_are_sent_ahead_are_answered_one_after_the_other() -> None:
    async with connected() as (reader, writer):
        writer.write(GET % b"slow" + GET % b"b" + GET % b"c" + b"GET /la")
        assert await answers(reader, 1) == ["GET /slow 0;"]
        writer.write(b"st HTTP/1.1\r\n\r\n")
        assert await answers(reader, 3) == ["GET /b 0;", "GET /c 0;", "GET /last 0;"]


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 3\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"]
)
async def test_a_request_may_arrive_byte_by_byte(framing: bytes) -> None:
    async with connected() as (reader, writer):
        for byte in b"POST /a/path HTTP/1.1\r\nHost: here\r\n" + framing:
            writer.write(bytes([byte]))
            await asyncio.sleep(0)
        assert await answers(reader, 1) == ["POST /a/path 3;"]


async def test_a_client_that_awaits_100_gets_it_before_the_answer() -> None:
    async with connected() as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"x")
        assert await answers(reader, 1) == ["POST / 1;"]


async def test_an_upgrade_is_not_followed() -> None:
    async with connected() as (reader, writer):
        writer.write(b"GET /a HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
        assert await answers(reader, 1) == ["GET /a 0;"]
        writer.write(GET % b"b")
        assert await answers(reader, 1) == ["GET /b 0;"]


@pytest.mark.parametrize("asked", [b"GET / HTTP/1.0\r\n\r\n", b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n"])
async def test_a_connection_that_is_not_to_be_kept_is_closed_after_the_answer(asked: bytes) -> None:
    async with connected() as (reader, writer):
        writer.write(asked)
        assert (await rest(reader)).endswith(b"GET / 0;")


async def test_invalid_http_gets_400_and_the_connection_is_closed() -> None:
    async with connected() as (reader, writer):
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
        assert (await rest(reader)).startswith(b"HTTP/1.1 400 Bad Request\r\n")


async def test_an_answer_that_raises_closes_the_connection_and_is_reported_to_the_loop() -> None:
    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
    async with connected() as (reader, writer):
        writer.write(GET % b"error")
        assert await rest(reader) == b""
    assert [str(each) for each in told] == ["as it was asked to"]


async def test_an_idle_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected() as (reader, writer):
        monkeypatch.setattr(http_server, "KEEP_ALIVE", 0.01)
        writer.write(GET % b"a" + GET % b"slow")  # takes longer than the limit, but is not idle
        assert (await rest(reader)).endswith(b"GET /slow 0;")


@pytest.mark.parametrize(("grace", "answered"), [(5, True), (0, False)])
async def test_running_answers_get_a_grace_when_the_server_ends(grace: float, *, answered: bool) -> None:
    async with connected(grace) as (reader, writer):
        writer.write(GET % b"a" + GET % b"slow")
        await answers(reader, 1)
    assert (await rest(reader)).endswith(b"GET /slow 0;") is answered
