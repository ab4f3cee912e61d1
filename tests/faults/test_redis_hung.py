"""Redis accepts connections and does not answer: stopped, paused, or behind a network that drops everything."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from pathlib import Path

import pytest

from imstream.codes import Code, Event
from tests.support.servers import DemoBackend, RedisServer
from tests.support.stage import AT_ONCE, fresh_redis, stage
from tests.support.tcp_proxy import TcpProxy, tcp_proxy
from tests.support.waiting import SLOW, wait_until

TIMEOUT, BLOCK = 1.0, 0.2
NOT_READY_WITHIN = BLOCK + 2 * TIMEOUT + 2.0
"""Time limit in seconds: two after which a node must have reached Redis, and two for a busy machine."""
BACK_WITHIN = 5.0
PAUSE = 12.0
"""Seconds, much longer than needed: CLIENT PAUSE ALL also blocks CLIENT UNPAUSE."""

USERS = 20
LANES = 4
SLOWLY = "[[demo first=0s pace=10ms length=100]]"


@contextmanager
def stopped(server: RedisServer, _: TcpProxy) -> Iterator[None]:
    """SIGSTOP: the kernel accepts connections, and the process does not answer."""
    assert server.process is not None
    server.process.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.process.signal(signal.SIGCONT)


@contextmanager
def paused(server: RedisServer, _: TcpProxy) -> Iterator[None]:
    """CLIENT PAUSE: connections are accepted, and every command waits."""
    with server.client(timeout=PAUSE * SLOW) as client:
        client.client_pause(int(PAUSE * 1000))
        yield
        client.ping()


@contextmanager
def half_open(_: RedisServer, proxy: TcpProxy) -> Iterator[None]:
    """A network that drops everything, and later resets the connections that were open."""
    proxy.swallow()
    try:
        yield
    finally:
        proxy.forward()


@pytest.mark.parametrize("hung", [stopped, paused, half_open])
async def test_a_hung_redis_means_unavailable_in_time_with_nothing_piling_up_and_ends_by_itself(
    demo: DemoBackend,
    tmp_path: Path,
    hung: Callable[[RedisServer, TcpProxy], AbstractContextManager[None]],
) -> None:
    with fresh_redis(tmp_path) as server:
        async with (
            tcp_proxy(server.port) as proxy,
            stage(
                *(server, demo, tmp_path),
                redis_url=proxy.url,
                redis_connections=LANES,
                redis_timeout=TIMEOUT,
                read_block=BLOCK,
            ) as play,
        ):
            node = play.node
            users = [await play.user(10001 + number) for number in range(USERS)]
            tasks, files = await node.tasks(), node.open_files()
            assert await users[0].ask("running", f"who is running? {SLOWLY}") == Event.ACCEPTED
            length = len(await users[0].grown("running"))
            with hung(server, proxy):
                await node.becomes(503, limit=NOT_READY_WITHIN)
                assert await node.status("/healthz") == 200
                # Text does not wait for Redis: it arrives as it is generated.
                await users[0].grown("running", length + 20)
                for round_ in range(2):
                    asked = [user.ask(f"m{round_}", f"do you hear me? {AT_ONCE}") for user in users]
                    assert set(await asyncio.gather(*asked)) == {Code.UNAVAILABLE}
                    assert node.connections_to(proxy.port) <= LANES + 2
                    assert node.open_files() <= files + LANES + 3
                    assert await node.tasks() <= tasks + USERS
            await node.becomes(200, limit=BACK_WITHIN)
            for round_ in range(2):
                # A command may still miss its time limit when the machine stalls; clients retry.
                question = f"do you hear me? {AT_ONCE}"
                again = [user.ask_until_accepted(f"m{round_}", question, BACK_WITHIN * SLOW) for user in users]
                assert set(chain.from_iterable(await asyncio.gather(*again))) <= {Code.UNAVAILABLE}
            await play.curtain()
            assert play.ai_calls() == 1 + 2 * USERS

            async def as_before() -> bool:
                return await node.tasks() <= tasks and node.connections_to(proxy.port) <= LANES + 2

            await wait_until(as_before, "no task and no connection is left over")
