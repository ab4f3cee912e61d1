"""The HTTP client of AI backends: framing, connections, TLS, and tunnels through a proxy."""

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvloop
from yarl import URL

from imstream.ai import failures
from imstream.ai.held_connection import RECEIVE_BUFFER, HeldConnection
from imstream.ai.http_client import ConnectFailed, HttpClient
from imstream.ai.http_connection import HttpConnection
from imstream.ai.http_response import BadResponse, BodyBroken, ConnectionLost, HttpError
from tests.support.certificates import Authority
from tests.support.scripted_backend import LIMIT, Exchange, Script, ScriptedBackend, scripted_backend

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ANYWHERE = URL("http://host/v1")


def sends(*parts: bytes, closes: bool = False) -> Script:
    """A script: these bytes, each in its own write."""

    async def script(exchange: Exchange) -> None:
        for part in parts:
            await exchange.write(part)
        if closes:
            exchange.close()

    return script


@asynccontextmanager
async def client_of(url: str, *, proxy: str | None = None, keep_alive: float = 60) -> AsyncIterator[HttpClient]:
    through = URL(proxy) if proxy else None
    client = HttpClient(URL(url), {}, proxy=through, limit=1 << 20, keep_alive=keep_alive)
    async with asyncio.timeout(3 * LIMIT):
        yield client
        await client.close()


@asynccontextmanager
async def serving(*scripts: Script, keep_alive: float = 60) -> AsyncIterator[tuple[HttpClient, ScriptedBackend]]:
    async with scripted_backend() as backend, client_of(backend.url, keep_alive=keep_alive) as client:
        backend.then(*scripts)
        yield client, backend


async def ask(client: HttpClient) -> bytes:
    """The body of the response to a request."""
    async with await client.request("POST", ANYWHERE, b"{}") as response:
        return await response.read_all()


# Framing


@pytest.mark.parametrize(
    ("parts", "closes", "body"),
    [
        pytest.param([OK], False, b"ok", id="a length"),
        pytest.param([OK.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n")], True, b"ok", id="a length, then closed"),
        pytest.param([b"HTTP/1.0 200 OK\r\n\r\no", b"k"], True, b"ok", id="HTTP/1.0, until it is closed"),
        pytest.param([b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok"], False, b"ok", id="lines without CR"),
        pytest.param(
            [CHUNKED + b"1\r\no\r\n1;a=b\r\nk\r\n0\r\nStatus: 7\r\n\r\n"],
            *(False, b"ok"),
            id="chunks with an extension and a trailer",
        ),
        pytest.param([b"HTTP/1.1 204 No Content\r\n\r\n"], False, b"", id="no body"),
        pytest.param(
            [b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nA: b\r\n\r\n", OK], False, b"ok", id="interim"
        ),
        pytest.param([bytes([byte]) for byte in OK], False, b"ok", id="byte by byte"),
    ],
)
async def test_a_body_ends_as_its_head_says(parts: list[bytes], closes: bool, body: bytes) -> None:  # noqa: FBT001 - a column
    async with serving(sends(*parts, closes=closes), sends(OK)) as (client, backend):
        assert [await ask(client), await ask(client)] == [body, b"ok"]
        assert backend.connections == 1 + closes


async def test_fields_of_the_same_name_are_joined_and_those_of_interim_responses_and_trailers_do_not_count() -> None:
    interim, head = b"HTTP/1.1 103 \r\nA: no\r\n\r\n", CHUNKED.replace(b"OK\r\n", b"OK\r\nA:  1 \r\na: 2\r\n")
    async with (
        serving(sends(interim + head + b"0\r\nA: no\r\n\r\n")) as (client, _),
        await client.request("POST", ANYWHERE, b"{}") as response,
    ):
        assert response.headers == {"a": "1, 2", "transfer-encoding": "chunked"}
        assert await response.read_all() == b""


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        pytest.param(b"", ConnectionLost, id="nothing"),
        pytest.param(b"HTTP/1.1 200 OK\r\nConte", ConnectionLost, id="half a head"),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n", ConnectionLost, id="only an interim response"),
        pytest.param(b"SSH-2.0-x\r\n", BadResponse, id="another protocol"),
        pytest.param(OK.replace(b"OK\r\n", b"OK\r\nTransfer-Encoding: chunked\r\n"), BadResponse, id="two framings"),
        pytest.param(OK.replace(b"OK\r\n", b"OK\r\nContent-Length: 3\r\n"), BadResponse, id="two lengths"),
        pytest.param(OK.replace(b"200", b"099"), BadResponse, id="a status below 100"),
        pytest.param(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 2000 + b"\r\n", BadResponse, id="many fields"),
        pytest.param(OK[:-1], BodyBroken, id="half a body"),
        pytest.param(CHUNKED + b"2\r\nok\r\n", BodyBroken, id="no last chunk"),
    ],
)
async def test_a_response_that_is_cut_or_no_http_is_an_error(answer: bytes, error: type[HttpError]) -> None:
    async with serving(sends(answer, closes=True)) as (client, _):
        with pytest.raises(error):
            await ask(client)


# Connections


async def test_a_connection_that_is_not_used_is_closed_after_a_while() -> None:
    async with serving(sends(OK), sends(OK), keep_alive=0.05) as (client, backend):
        assert await ask(client) == b"ok"
        await backend.requests[0].gone()
        assert await ask(client) == b"ok"
        assert backend.connections == 2


async def test_bytes_after_a_response_close_its_connection_and_leave_it_whole() -> None:
    async with serving(sends(OK + OK), sends(OK)) as (client, backend):
        assert [await ask(client), await ask(client)] == [b"ok", b"ok"]
        assert backend.connections == 2
        await backend.requests[0].gone()


async def test_bytes_without_a_request_close_their_connection() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.write(OK)
        await answered.wait()
        await exchange.write(OK)
        await exchange.gone()

    answered = asyncio.Event()
    async with serving(script) as (client, backend):
        assert await ask(client) == b"ok"
        answered.set()
        await backend.requests[0].gone()


async def test_a_connection_that_was_lost_before_it_is_used_is_an_error() -> None:
    async with scripted_backend() as backend:
        loop = asyncio.get_running_loop()
        factory = partial(HttpConnection, limit=1000, on_end=lambda *_: None)
        transport, connection = await loop.create_connection(factory, "127.0.0.1", backend.port)
        transport.abort()
        await asyncio.sleep(0)  # the connection learns of it
        with pytest.raises(ConnectionLost):
            await asyncio.wait_for(connection.send(b"GET / HTTP/1.1\r\n\r\n"), LIMIT)


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_connection_whose_request_was_answered_before_it_was_sent_is_not_used_again(
    scheme: str, authority: Authority
) -> None:
    tls = server_tls(authority, "localhost") if scheme == "https" else None
    connections = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        await asyncio.get_running_loop().create_future()

    async with listening(handler, tls) as port, client_of(f"{scheme}://localhost:{port}") as client:
        for _ in range(2):
            async with await client.request("POST", ANYWHERE, b" " * (16 << 20)) as response:
                assert await response.read_all() == b"ok"
    assert connections == 2


async def test_a_body_that_nobody_reads_stays_with_the_server() -> None:
    size = 1 << 19

    async def script(exchange: Exchange) -> None:
        await exchange.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size)

    async with serving(script) as (client, backend), await client.request("POST", ANYWHERE, b"{}") as response:
        received = -1
        while received < response.received:  # until it stalls
            received = response.received
            await asyncio.sleep(0.05)  # much longer than the loopback takes
        assert 0 < received < 8 * RECEIVE_BUFFER
        assert len(await response.read_all()) == size
        assert response.at_end
        assert backend.problems == []


async def test_a_server_that_listens_at_one_of_its_addresses_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    look_up = loop.getaddrinfo

    async def addresses(host: str, port: int, **given: Any) -> list[Any]:  # noqa: ANN401 - passed on
        hosts = ("::1", "127.0.0.1") if host == "both.example" else (host,)
        return [each for one in hosts for each in await look_up(one, port, **given)]

    async with scripted_backend(sends(OK)) as backend:
        monkeypatch.setattr(loop, "getaddrinfo", addresses)
        async with client_of(f"http://both.example:{backend.port}/v1") as client:
            assert await ask(client) == b"ok"


# TLS and tunnels

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Serve connections; yields the port."""
    async with asyncio.TaskGroup() as group:
        tasks: list[asyncio.Task[None]] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await handler(reader, writer)
            except (OSError, asyncio.IncompleteReadError):
                pass  # the client has gone
            finally:
                writer.transport.abort()

        def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            tasks.append(group.create_task(serve(reader, writer)))

        async with await asyncio.start_server(begin, "127.0.0.1", 0, ssl=tls) as server:
            yield server.sockets[0].getsockname()[1]
        for task in tasks:
            task.cancel()


async def answer_ok(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer each request."""
    while await reader.readuntil(b"\r\n\r\n{}"):
        writer.write(OK)


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """An authority that clients trust."""
    made = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(made.file))
    return made


def server_tls(authority: Authority, name: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(authority.issue(name).both)
    return context


async def test_requests_by_tls_share_a_connection(authority: Authority) -> None:
    connections = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await answer_ok(reader, writer)

    async with (
        listening(handler, server_tls(authority, "localhost")) as port,
        client_of(f"https://localhost:{port}") as client,
    ):
        assert [await ask(client), await ask(client)] == [b"ok", b"ok"]
    assert connections == 1


@pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop])
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_body_that_is_read_after_the_server_has_closed_is_whole(
    loop: Callable[[], asyncio.AbstractEventLoop], version: bytes, authority: Authority
) -> None:
    size = 100_000

    async def read_late() -> bytes:
        closed = asyncio.Event()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"{}")
            length = b"Content-Length: %d\r\n" % size if version == b"1.1" else b""
            writer.write(b"HTTP/%b 200 OK\r\n%bConnection: close\r\n\r\n%b" % (version, length, b"x" * size))
            writer.close()
            closed.set()
            await writer.wait_closed()

        async with (
            listening(handler, server_tls(authority, "localhost")) as port,
            client_of(f"https://localhost:{port}") as client,
            await client.request("POST", ANYWHERE, b"{}") as response,
        ):
            await closed.wait()
            await asyncio.sleep(0.3)  # much longer than the loopback takes
            return await response.read_all()

    with asyncio.Runner(loop_factory=loop) as runner:
        assert runner.run(read_late()) == b"x" * size


async def test_a_proxy_that_is_none_keeps_no_connection() -> None:
    gone = asyncio.Event()

    async def banner(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        with suppress(ConnectionResetError):
            while await reader.read(1024):
                pass
        gone.set()

    async with listening(banner) as port, client_of("https://ai.internal", proxy=f"http://localhost:{port}") as client:
        with pytest.raises(HttpError):
            await ask(client)
        async with asyncio.timeout(LIMIT):
            await gone.wait()


async def test_a_body_whose_connection_is_reset_while_it_is_held_is_broken() -> None:
    held: list[HeldConnection] = []
    is_held = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(b"HTTP/1.0 200 OK\r\n\r\nabc")
        await is_held.wait()
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        asyncio.get_running_loop().call_later(0.1, held[0].release)

    def hold(connection: HeldConnection) -> None:
        if not held:
            held.append(connection)
            connection.hold()
            is_held.set()

    async with (
        listening(handler) as port,
        client_of(f"http://localhost:{port}") as client,
        await client.request("POST", ANYWHERE, b"{}") as response,
    ):
        with pytest.raises(BodyBroken):
            await response.stream(lambda _: True, hold)


@pytest.mark.parametrize("name", ["elsewhere.example", None])
async def test_a_certificate_of_another_server_or_another_authority_is_misconfigured(
    name: str | None, authority: Authority, tmp_path: Path
) -> None:
    if name is None:
        (tmp_path / "other").mkdir()
        authority = Authority(tmp_path / "other")
    async with (
        listening(answer_ok, server_tls(authority, name or "localhost")) as port,
        client_of(f"https://localhost:{port}") as client,
    ):
        with pytest.raises(ConnectFailed, match="certificate verify failed") as caught:
            await ask(client)
    error = failures.from_exception(caught.value)
    assert (error.kind, error.reason) == ("misconfigured", "connect_failed")
    assert f"localhost:{port}" in error.detail


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 200 Connection established\r\n"])
@pytest.mark.parametrize("fields", [b"\r\n", b"Content-Length: 0\r\n\r\n"])
async def test_a_tunnel_carries_one_request_after_the_other(head: bytes, fields: bytes, authority: Authority) -> None:
    asked: list[bytes] = []

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            target.write(data)

    async with listening(answer_ok, server_tls(authority, "ai.internal")) as port:

        async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(head + fields)
            there, back = await asyncio.open_connection("127.0.0.1", port)
            try:
                await asyncio.gather(copy(reader, back), copy(there, writer))
            finally:
                back.transport.abort()

        async with (
            listening(tunnel) as proxy,
            client_of("https://ai.internal/v1", proxy=f"http://me:pass@127.0.0.1:{proxy}") as client,
        ):
            assert [await ask(client), await ask(client)] == [b"ok", b"ok"]
    [connect] = asked
    assert connect.startswith(b"CONNECT ai.internal:443 HTTP/1.1\r\nHost: ai.internal:443\r\n")
    assert b"\r\nProxy-Authorization: Basic " in connect
