"""Limits of the shipped load balancer configurations for untrusted clients, with the real nginx and HAProxy.

This machine itself, 127.0.0.1, is not limited; clients come from other addresses of the loopback network.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from imstream.cli.balancer import BalancerConfig, Program, find_program, render
from imstream.gateway.app import page_routes
from imstream.user_ids import UserIds
from tests.support.balancing import PROGRAMS
from tests.support.processes import free_port, http_status, start, wait_for
from tests.support.servers import missing
from tests.support.waiting import wait_until

LOCAL, CLIENT, OTHER_CLIENT = "127.0.0.1", "127.0.0.2", "127.0.0.3"

LIMITS = {
    "connections": {"nginx": "limit_conn connections 1000", "haproxy": "sc0_conn_cur(connections) gt 1000"},
    "handshakes": {"nginx": "zone=handshakes burst=400", "haproxy": "sc1_gpc0_rate(handshakes) ge 400"},
    "requests": {"nginx": "zone=requests burst=2000", "haproxy": "sc2_gpc0_rate(requests) ge 2000"},
}
"""The text of each limit, which ends with its number."""

MAX_OPEN = 100
"""Sockets at the node at the same time, while handshakes are made in a row."""

HEAD = b"GET %b HTTP/1.1\r\nHost: chat.example.com\r\n%b\r\n"
UPGRADE = (
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
SWITCHING = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)


@dataclass
class FakeNode:
    """A node that is ready, accepts every socket, and delays the answer to `/` until `answering` is set."""

    port: int = 0
    requests: list[str] = field(default_factory=list)
    answering: asyncio.Event = field(default_factory=asyncio.Event)
    connections: dict[asyncio.Task[None] | None, asyncio.StreamWriter] = field(default_factory=dict)

    async def close(self) -> None:
        """Close all connections."""
        self.answering.set()
        for writer in self.connections.values():
            writer.close()
        await asyncio.gather(*(task for task in [*self.connections] if task), return_exceptions=True)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        self.connections[asyncio.current_task()] = writer
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
                if path != "/readyz":
                    self.requests.append(path)
                if path == "/":
                    await self.answering.wait()
                if path.startswith("/ws"):
                    writer.write(SWITCHING)
                    await reader.read()
                    break
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        with suppress(ConnectionError):
            writer.close()
            await writer.wait_closed()
        del self.connections[asyncio.current_task()]


@dataclass
class RunningBalancer:
    """A running load balancer, as its clients see it."""

    port: int
    node: FakeNode

    async def connect(self, address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect from an address."""
        return await asyncio.open_connection(LOCAL, self.port, local_addr=(address, 0))

    async def get(self, address: str, path: str, headers: bytes = b"Connection: close\r\n") -> int | None:
        """The status of a GET; None if the connection is refused."""
        with suppress(ConnectionError):
            reader, writer = await self.connect(address)
            with closing(writer):
                writer.write(HEAD % (path.encode(), headers))
                async with asyncio.timeout(20):
                    return status_of(await reader.readline())
        return None

    async def handshake(self, address: str) -> int | None:
        """The status of a handshake; a socket that it opens is closed."""
        return await self.get(address, "/ws?userId=10001", UPGRADE)

    async def handshakes(self, address: str, count: int) -> list[int | None]:
        """So many handshakes in a row. A slow balancer and node get time to close what is closed."""
        statuses = []
        for _ in range(count):
            statuses.append(await self.handshake(address))
            await wait_until(lambda: len(self.node.connections) < MAX_OPEN, "sockets that were closed are gone")
        return statuses


def status_of(line: bytes) -> int | None:
    """The status in the first line of a response; None without a line."""
    return int(line.split()[1]) if line else None


@asynccontextmanager
async def run_balancer(
    program: Program, folder: Path, limits: Mapping[str, int], *, seconds: int = 10
) -> AsyncIterator[RunningBalancer]:
    """The shipped configuration in front of a fake node, with some of its limits changed."""
    path = find_program(program)
    if path is None:
        missing(program)
        return
    node, port = FakeNode(), free_port()
    server = await asyncio.start_server(node.answer, LOCAL, backlog=2048)  # as a node has
    async with server:
        node.port = server.sockets[0].getsockname()[1]
        text = render(BalancerConfig(program, f"{LOCAL}:{port}", [f"{LOCAL}:{node.port}"]))
        for name, number in limits.items():
            shipped = LIMITS[name][program]
            assert text.count(shipped) == 1
            text = text.replace(shipped, re.sub(r"\d+$", str(number), shipped))
        if limits:  # a slow machine must not regain tokens during the test
            text = re.sub(r"rate=\d+r/s", "rate=1r/s", text)
        if seconds != 10:
            text = re.sub(r"(client_header_timeout|http-request|timeout client) ( *)10s", rf"\1 \g<2>{seconds}s", text)
        config = folder / "config"
        config.write_text(text)
        command = [path, "-db", "-f", str(config)]
        if program == "nginx":
            command = [path, "-e", "stderr", "-p", str(folder), "-c", str(config)]
        with start(command, folder / "log", cwd=folder) as running:
            await asyncio.to_thread(
                wait_for, lambda: http_status(f"http://{LOCAL}:{port}/readyz") == 200, running, program
            )
            yield RunningBalancer(port, node)
        await node.close()


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("limit", [20, pytest.param(1000, marks=pytest.mark.long)])
async def test_one_address_has_so_many_connections_at_once_and_others_do_not_notice(
    program: Program, limit: int, tmp_path: Path
) -> None:
    # A slow machine must not reach the time limits of the first connections before the last one is made.
    async with run_balancer(program, tmp_path, {} if limit == 1000 else {"connections": limit}, seconds=60) as balancer:
        waiting = await asyncio.gather(*(balancer.connect(CLIENT) for _ in range(limit)))
        for _, writer in waiting:
            writer.write(HEAD % (b"/", b""))
        await wait_until(lambda: len(balancer.node.requests) == limit, "all requests have arrived")
        assert await balancer.handshake(CLIENT) in {429, None}

        async def is_accepted(address: str) -> bool:
            return await balancer.handshake(address) == 101

        # On a slow machine, HAProxy may have taken the node, which had all these requests, to be away for a moment.
        for address in (OTHER_CLIENT, LOCAL):
            await wait_until(partial(is_accepted, address), "another address is served")
        assert await balancer.handshake(CLIENT) in {429, None}
        balancer.node.answering.set()
        for _, writer in waiting:
            writer.close()
        await wait_until(partial(is_accepted, CLIENT), "connections are free again")


@pytest.mark.parametrize("program", PROGRAMS)
async def test_refusals_do_not_fill_the_log_of_the_balancer(program: Program, tmp_path: Path) -> None:
    huge = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"
    async with run_balancer(program, tmp_path, {"handshakes": 5, "connections": 20}) as balancer:
        before = (tmp_path / "log").read_text()
        statuses = [await balancer.handshake(CLIENT) for _ in range(20)]
        assert 429 in statuses
        for _ in range(5):
            reader, writer = await balancer.connect(CLIENT)
            writer.write(huge)
            assert int((await reader.readline()).split()[1]) >= 400
            writer.close()
        assert (tmp_path / "log").read_text() == before


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("limit", [10, pytest.param(400, marks=pytest.mark.long)])
async def test_one_address_opens_so_many_sockets_in_a_row_and_others_do_not_notice(
    program: Program, limit: int, tmp_path: Path
) -> None:
    async with run_balancer(program, tmp_path, {} if limit == 400 else {"handshakes": limit}) as balancer:
        statuses = await balancer.handshakes(CLIENT, 3 * limit)
        assert statuses[:limit] == [101] * limit
        assert statuses.count(429) >= limit
        assert set(statuses) == {101, 429}
        assert await balancer.handshake(OTHER_CLIENT) == 101
        assert await balancer.get(CLIENT, "/imstream.js") == 200
        assert await balancer.handshakes(LOCAL, 2 * limit) == [101] * 2 * limit

        if limit == 400:

            async def is_accepted() -> bool:  # retries do not extend the limitation
                return await balancer.handshake(CLIENT) == 101

            await wait_until(is_accepted, "it is accepted again", limit=40)


@pytest.mark.parametrize("program", PROGRAMS)
async def test_one_address_makes_so_many_requests_in_a_row(program: Program, tmp_path: Path) -> None:
    async with run_balancer(program, tmp_path, {"requests": 10}) as balancer:
        statuses = [await balancer.get(CLIENT, "/imstream.js") for _ in range(40)]
        assert statuses[:10] == [200] * 10
        assert statuses.count(429) >= 10
        assert await balancer.get(OTHER_CLIENT, "/imstream.js") == 200
        assert await balancer.handshake(CLIENT) == 101
        assert [await balancer.get(LOCAL, "/imstream.js") for _ in range(20)] == [200] * 20


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("seconds", [1, pytest.param(10, marks=pytest.mark.long)])
async def test_a_head_that_comes_byte_by_byte_is_cut_in_time(program: Program, seconds: int, tmp_path: Path) -> None:
    async with run_balancer(program, tmp_path, {}, seconds=seconds) as balancer:
        reader, writer = await balancer.connect(CLIENT)
        with closing(writer):
            end = asyncio.create_task(reader.read())
            writer.write(b"GET / HTTP/1.1\r\nX: ")
            began, pieces = asyncio.get_running_loop().time(), 0
            while not end.done():
                assert (pieces := pieces + 1) < 30 * seconds, "it is still open"
                writer.write(b"x")
                await asyncio.wait([end], timeout=0.1)
            assert asyncio.get_running_loop().time() - began >= 0.5 * seconds
            assert end.exception() is not None or status_of(end.result()) in {408, None}
        assert balancer.node.requests == []


HIDDEN = [
    *("/readyz", "/healthz", "/metrics", "/ops", "/ops/", "/ops/streams", "/nothing"),
    *("//readyz", "/./readyz", "/x/../readyz", "/%72eadyz", "/readyz/", "/readyz?userId=10001", "/.ready", "/READYZ"),
    *(
        "/ws/../readyz",
        "/imstream.js/../readyz",
        "/ws/x",
        "/x/page.js",
        "/page.js/x",
        "/.js",
        "http://chat.example.com/readyz",
        "/;/readyz",
    ),
]


@pytest.mark.parametrize("program", PROGRAMS)
async def test_strangers_reach_the_page_and_the_socket_and_nothing_else(program: Program, tmp_path: Path) -> None:
    async with run_balancer(program, tmp_path, {}) as balancer:
        balancer.node.answering.set()
        statuses = {path: await balancer.get(CLIENT, path) for path in HIDDEN}
        assert statuses == dict.fromkeys(HIDDEN, 404)
        assert balancer.node.requests == []
        for route in page_routes(UserIds.NUMBER, 65536, 200):
            assert await balancer.get(CLIENT, f"{route.path}?x=1") == 200
        assert await balancer.handshake(CLIENT) == 101
        for path in ("/readyz", "/healthz", "/metrics"):
            assert await balancer.get(LOCAL, path) == 200
            for header in (b"X-Forwarded-For: 192.0.2.1", b"Forwarded: for=192.0.2.1"):  # by a proxy on this machine
                assert await balancer.get(LOCAL, path, header + b"\r\nConnection: close\r\n") == 404
