"""Floods of idle connections, slow handshakes, and peers that do not close: other clients are not affected.

After their time nothing is left of them: no connection, no file, no memory. The node has no garbage collector.
"""

import asyncio
import json
import resource
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from statistics import median

import psutil
import pytest

from imstream.gateway.server import SPARE_CONNECTIONS
from tests.support.handshakes import LARGE, PASSING, upgrade
from tests.support.one_node import NO_IDENTITY, OneNode, standing_node
from tests.support.peer import Peer
from tests.support.raw_socket import CLOSE, TEXT, RawSocket, frame, raw_socket, raw_user
from tests.support.servers import DemoBackend
from tests.support.waiting import SLOW, wait_until

OTHER = 10002
TIME = 1.5
SOCKETS = 100
MB = 1 << 20

UPGRADE = (
    b"GET /ws?userId=10001 HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
PAGE = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"

UNCOLLECTED = ("-m", "tests.support.uncollected_node")

FIRST_BYTES = {
    "says nothing": b"",
    "half a request": b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: ",
    "half an upgrade": UPGRADE,
    "half a body": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\nhello",
    "half a chunk": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nFFFF\r\nhello",
    "a request and nothing more": PAGE,
    "a socket without INIT": UPGRADE + b"\r\n",
}
"""The first bytes of a connection, before it goes silent or sends a byte from time to time."""


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, demo: DemoBackend) -> Iterator[OneNode]:
    """A node with short timeouts for handshakes and logins."""
    limits = {
        "handshake_timeout": f"{TIME}s",
        "init_timeout": f"{TIME}s",
        "node_sockets": SOCKETS,
        "redis_timeout": "10s",
    }
    with standing_node(tmp_path_factory.mktemp("flood"), demo.url, None, UNCOLLECTED, **limits) as node:
        yield node


@pytest.fixture
async def node(standing: OneNode) -> AsyncIterator[OneNode]:
    """The node; after the test nothing is left of any connection."""
    yield standing
    await standing.settled()
    check_log(standing)


def check_log(node: OneNode) -> None:
    """The node has logged no error and no warning."""
    node.check_log()
    # Lines that anyone can cause are rate-limited; the count of dropped lines is expected.
    expected = (NO_IDENTITY, '"event":"log lines dropped"')
    lines = [line for line in node.now.process.output().splitlines() if not any(one in line for one in expected)]
    complaints = [line for line in lines if '"level":"error"' in line or '"level":"warning"' in line]
    assert complaints == [], "strangers can fill the log"


@asynccontextmanager
async def crowd(port: int, first: bytes, count: int, *, narrow: bool = False) -> AsyncIterator[list[RawSocket]]:
    """Open `count` connections that send these first bytes."""
    async with AsyncExitStack() as stack:
        everybody = [await stack.enter_async_context(raw_socket(port, narrow=narrow)) for _ in range(count)]
        for one in everybody:
            await one.send(first)
        yield everybody


async def beat(someone: Peer) -> float:
    """Send one heartbeat; how long the answer took."""
    began = time.monotonic()
    await someone.send("PING")
    while (await someone.frame())["msgType"] != "HEARTBEAT":
        pass
    return time.monotonic() - began


async def typical_beat(someone: Peer, seconds: float) -> float:
    """Send heartbeats for a while; the median time that an answer took: one may wait for a process without CPU."""
    took, end = list[float](), time.monotonic() + seconds
    while time.monotonic() < end:
        took.append(await beat(someone))
        await asyncio.sleep(0.01)  # the pace of the healthy client
    return median(took)


@asynccontextmanager
async def trickling(everybody: list[RawSocket]) -> AsyncIterator[None]:
    """Send a byte on each connection every 0.2 s meanwhile."""

    async def trickle() -> None:
        while True:
            await asyncio.gather(*(one.send(b"x") for one in everybody), return_exceptions=True)
            await asyncio.sleep(0.2)  # the pace of a slow client

    task = asyncio.create_task(trickle())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_500_connections_that_never_come_to_anything_are_cut_in_time_and_cost_nobody_anything(
    node: OneNode,
) -> None:
    process = psutil.Process(node.now.process.pid)
    async with node.peer(OTHER) as healthy:
        calm = await typical_beat(healthy, 0.5)
        files = memory = 0
        for _ in range(2):  # memory that the first crowd allocates is reused for the second
            files, memory = process.num_fds(), process.memory_info().rss
            async with AsyncExitStack() as stack:
                began = time.monotonic()
                everybody = [
                    one
                    for first in FIRST_BYTES.values()
                    for one in await stack.enter_async_context(crowd(node.port, first, 500 // len(FIRST_BYTES)))
                ]
                await beat(healthy)  # the node accepts all of them before it continues
                async with trickling(everybody[::2]):
                    assert await typical_beat(healthy, 1) < calm + 0.5 * SLOW
                    async with node.peer(OTHER) as newcomer:
                        question = "still there? [[demo first=0 length=3]]"
                        assert (await newcomer.chat(OTHER, question, f"m{began}"))["event"] == "accepted"
                        assert (await newcomer.end_of(f"m{began}")).events[-1] == "done"
                    await wait_until(lambda: node.clients() == 1, "only the healthy connection is left", limit=TIME + 6)
        # Up to five connections to Redis are opened on demand.
        await wait_until(lambda: process.num_fds() <= files + 5, "no file is left open")
        assert process.memory_info().rss - memory < 4 * MB


@pytest.mark.parametrize("what", FIRST_BYTES)
async def test_each_of_them_is_let_go(what: str, node: OneNode) -> None:
    began = time.monotonic()
    async with raw_socket(node.port) as one:
        await one.send(FIRST_BYTES[what])
        await one.ended(limit=TIME + 8)
        assert time.monotonic() - began > TIME * 0.5  # not before the timeout
    await wait_until(lambda: node.clients() == 0, "it is closed")


async def test_half_of_a_second_request_is_not_waited_for_either(node: OneNode) -> None:
    async with raw_socket(node.port) as one:
        await one.send(PAGE)
        await one.body(await one.head())
        await one.send(b"GET / HT")
        assert await one.ended(limit=TIME + 8) == b""


async def test_requests_that_do_not_wait_for_answers_are_refused_and_do_not_gather(node: OneNode) -> None:
    process = psutil.Process(node.now.process.pid)
    async with raw_socket(node.port) as one:
        await one.send(PAGE * 2)
        assert (await one.head()).startswith(b"HTTP/1.1 400 ")
    for _ in range(2):
        memory = process.memory_info().rss
        async with AsyncExitStack() as stack:
            for _ in range(20):
                one = await stack.enter_async_context(raw_socket(node.port, narrow=True))
                with suppress(ConnectionError):
                    await one.send(PAGE * 8_000)
            await wait_until(lambda: node.clients() == 0, "they are closed", limit=TIME + 6)
    assert process.memory_info().rss - memory < 4 * MB


async def test_who_asks_for_a_page_and_does_not_read_it_is_cut(node: OneNode) -> None:
    async with crowd(node.port, PAGE, 50, narrow=True):
        await wait_until(lambda: node.clients() == 0, "they are closed", limit=TIME + 6)


async def test_a_request_in_time_is_answered_also_on_a_connection_that_is_used_again(node: OneNode) -> None:
    async with raw_socket(node.port) as someone:
        began = time.monotonic()
        while time.monotonic() - began < 2 * TIME:  # longer than the timeout of one request
            await someone.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            head = await someone.head()
            assert head.startswith(b"HTTP/1.1 200 ")
            await someone.body(head)
            await asyncio.sleep(TIME / 15)  # as a load balancer does


async def test_who_reads_nothing_and_asks_to_close_is_cut(node: OneNode) -> None:
    for goodbye in (frame(CLOSE, b"\x03\xe8"), frame(TEXT, b"not masked", mask=False)):
        async with raw_user(node.port, OTHER, narrow=True) as someone:
            question = "go on [[demo first=0 pace=0 length=60000]]"
            await someone.send_frame(msgType="CHAT", userId=OTHER, contents=question, messageId=f"m{goodbye[0]}")
            await someone.until(event="accepted")
            await wait_until(lambda: node.unfinished() == 0, "the answer is complete, and unread")
            await someone.send(goodbye)
            await wait_until(lambda: node.clients() == 0, "it is aborted", limit=6)


# Sockets that come and go


async def _pass_by(port: int, what: str, *, reset: bool) -> None:
    """Connect, send something, read the answer if there is one, and disconnect."""
    first, then = PASSING[what]
    async with raw_socket(port) as one:
        with suppress(ConnectionError):
            await one.send(first)
            if what != "half a head":
                await one.head()
            if then:
                await one.send(then)
                if what in {"a login", "a message that is no JSON"}:
                    await one.next_frame()
        if reset:
            one.reset()


async def _more_objects(node: OneNode) -> Counter[str]:
    """How many more objects the node has than at the last call, by type."""

    def told() -> list[str]:
        printed = node.now.process.output().splitlines()  # the last line may be incomplete
        return [line for line in printed if line.startswith('{"event": "objects"') and line.endswith("}}")]

    before = len(told())
    node.now.process.signal(signal.SIGUSR1)
    await wait_until(lambda: len(told()) > before, "it reports its objects")
    return Counter(json.loads(told()[-1])["objects"])


async def _churn(node: OneNode, sockets: int) -> None:
    """Open and close this many connections of all kinds, 50 at a time, and wait until all are closed."""
    kinds = [(what, reset) for what in PASSING for reset in (False, True)]
    for _ in range(max(1, sockets // len(kinds))):
        await asyncio.gather(*(_pass_by(node.port, what, reset=reset) for what, reset in kinds))
    await wait_until(lambda: node.clients() + node.sessions() == 0, "all are closed", limit=TIME + 6)


@pytest.mark.parametrize("sockets", [2_000, pytest.param(20_000, marks=pytest.mark.long)])
async def test_nothing_is_left_of_sockets_that_are_gone_and_no_collector_is_needed_for_that(
    sockets: int, node: OneNode
) -> None:
    process = psutil.Process(node.now.process.pid)
    await _churn(node, 200)  # warm up
    await _more_objects(node)
    memory = process.memory_info().rss
    await _churn(node, sockets)
    left = await _more_objects(node)
    assert {kind: count for kind, count in left.items() if count > 50} == {}
    assert process.memory_info().rss - memory < 3 * MB


async def test_a_socket_keeps_nothing_of_its_handshake(node: OneNode) -> None:
    process = psutil.Process(node.now.process.pid)
    for users in (range(20001, 20011), range(20011, 20091)):  # the first ones warm up
        memory = process.memory_info().rss
        async with AsyncExitStack() as stack:
            for user in users:
                one = await stack.enter_async_context(raw_socket(node.port))
                await one.send(upgrade(*LARGE, line=f"GET /ws?userId={user} HTTP/1.1"))
                assert (await one.head()).startswith(b"HTTP/1.1 101 ")
                await one.send_frame(msgType="INIT", userId=user)
                await one.until(msgType="INIT")
            grown = process.memory_info().rss - memory
            assert node.sessions() == len(users)
        await wait_until(lambda: node.clients() + node.sessions() == 0, "they are closed")
    assert grown < len(users) * 40_000  # a socket with a small handshake takes 22 KB


async def test_beyond_its_sockets_a_node_takes_a_few_connections_and_refuses_the_others_with_503(
    demo: DemoBackend, tmp_path: Path
) -> None:
    # A long timeout: the last one connects before the first one is aborted, even on a slow machine.
    with standing_node(tmp_path, demo.url, handshake_timeout="1m", node_sockets=SOCKETS) as node:
        async with node.peer(OTHER) as healthy, crowd(node.port, b"", SOCKETS + SPARE_CONNECTIONS - 1):
            async with raw_socket(node.port) as one_more:
                assert (await one_more.head()).startswith(b"HTTP/1.1 503 ")
                assert await one_more.ended() == b"Too many connections"
            assert await typical_beat(healthy, 0.5) < SLOW
        await wait_until(lambda: node.clients() == 0, "they are closed")
        async with node.peer(OTHER) as newcomer:
            await newcomer.send("PING")
            assert (await newcomer.frame())["msgType"] == "HEARTBEAT"
        check_log(node)


async def test_a_node_without_files_takes_connections_again_as_soon_as_it_has_some(node: OneNode) -> None:
    process = psutil.Process(node.now.process.pid)
    limits = process.rlimit(resource.RLIMIT_NOFILE)
    async with node.peer(OTHER) as healthy:
        try:
            process.rlimit(resource.RLIMIT_NOFILE, (process.num_fds() + 20, limits[1]))
            async with crowd(node.port, b"", 20):
                await wait_until(lambda: node.clients() == 21, "all its files are in use")
                async with crowd(node.port, b"", 50):
                    assert await typical_beat(healthy, 1) < SLOW
            await wait_until(lambda: node.clients() == 1, "they are closed")
            async with node.peer(OTHER) as newcomer:
                await newcomer.send("PING")
                assert (await newcomer.frame())["msgType"] == "HEARTBEAT"
        finally:
            process.rlimit(resource.RLIMIT_NOFILE, limits)
