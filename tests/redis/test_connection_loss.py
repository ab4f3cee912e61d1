"""Redis hangs, dies, or is another service: callers get an error in time, and nothing is repeated."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest

from imstream.errors import StoreError, StoreRefused, StoreUnavailable
from imstream.redis import pipeline
from imstream.redis.client import BlockingReader, RedisClient
from imstream.redis.pipeline import Pipeline
from tests.support.servers import RedisServer
from tests.support.tcp_proxy import tcp_proxy
from tests.support.waiting import wait_until

SHORT = timedelta(seconds=1)


def pause(server: RedisServer) -> None:
    """Make the server hang: its connections stay open, and it does not answer."""
    assert server.process is not None
    server.process.signal(signal.SIGSTOP)


def resume(server: RedisServer) -> None:
    """Let it continue, with all commands that have arrived meanwhile."""
    assert server.process is not None
    server.process.signal(signal.SIGCONT)


async def test_a_hung_server_is_given_up_in_time_and_answers_again_later(own_server: RedisServer) -> None:
    async with RedisClient(own_server.admin_url, connections=2, timeout=SHORT) as redis_client:
        await redis_client.execute("PING")
        pause(own_server)
        began = asyncio.get_running_loop().time()
        results = await asyncio.gather(*(redis_client.execute("ECHO", n) for n in range(20)), return_exceptions=True)
        assert all(isinstance(result, StoreUnavailable) for result in results)
        assert asyncio.get_running_loop().time() - began < 5 * SHORT.total_seconds()
        resume(own_server)
        await wait_until(lambda: _answers(redis_client), "it answers again")
        # The late replies reach no other caller.
        assert await asyncio.gather(*(redis_client.execute("ECHO", f"{n}") for n in range(20))) == [
            f"{n}" for n in range(20)
        ]


def _all_sent(redis_client: RedisClient) -> bool:
    """Whether all commands were sent."""
    assert isinstance(redis_client._servers, Pipeline)  # noqa: SLF001 - there is no public name
    return not redis_client._servers._queue  # noqa: SLF001 - same


async def _answers(redis_client: RedisClient) -> bool:
    try:
        return bool(await redis_client.execute("PING"))
    except StoreError:
        return False


async def test_nothing_is_repeated_when_the_outcome_is_unknown(own_server: RedisServer) -> None:
    async with RedisClient(own_server.admin_url, connections=1, timeout=SHORT) as redis_client:
        await redis_client.execute("PING")
        pause(own_server)
        with pytest.raises(StoreUnavailable):
            await redis_client.execute("XADD", "s", "*", "a", "b")
        resume(own_server)
        await wait_until(lambda: _answers(redis_client), "it answers again")
        assert await redis_client.execute("XLEN", "s") == 1


async def test_what_is_on_its_way_when_it_is_given_up_is_not_delivered_later(redis_server: RedisServer) -> None:
    async with tcp_proxy(redis_server.port) as proxy:
        url = redis_server.admin_url.replace(f":{redis_server.port}", f":{proxy.port}")
        async with RedisClient(url, connections=1, timeout=SHORT) as redis_client:
            await redis_client.execute("PING")
            command = proxy.hold(b"SET", b"late")
            with pytest.raises(StoreUnavailable):  # it does not fit in the buffers of the proxy
                await redis_client.execute("SET", "late", 16_000_000 * b"x")
            command.released.set()
            await wait_until(lambda: proxy.open == 0, "the connection has ended")
            with redis_server.client() as client:
                assert not client.exists("late")


async def test_a_server_killed_and_started_again_is_found_again(own_server: RedisServer) -> None:
    async with RedisClient(own_server.admin_url, connections=2, timeout=SHORT) as redis_client:
        await redis_client.execute("PING")
        own_server.kill()
        with pytest.raises(StoreUnavailable):
            await redis_client.execute("PING")
        own_server.start()
        # Already the first command: no command is sent over a dead connection.
        assert await redis_client.execute("ECHO", "back") == "back"


async def test_while_redis_hangs_the_commands_that_wait_are_bounded(
    own_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "MAX_WAITING", 10)
    async with RedisClient(own_server.admin_url, connections=1, timeout=SHORT) as redis_client:
        await redis_client.execute("PING")
        pause(own_server)
        first = asyncio.create_task(redis_client.execute("PING"))
        await wait_until(lambda: _all_sent(redis_client), "it is sent")
        waiting = [asyncio.create_task(redis_client.execute("PING")) for _ in range(10)]
        await asyncio.sleep(0)
        with pytest.raises(StoreUnavailable, match="10 commands are waiting"):
            await redis_client.execute("PING")
        results = await asyncio.gather(first, *waiting, return_exceptions=True)
        assert all(isinstance(result, StoreUnavailable) for result in results)
        resume(own_server)
        await wait_until(lambda: _answers(redis_client), "it answers again")


async def test_a_caller_that_leaves_while_redis_hangs_does_no_harm(own_server: RedisServer) -> None:
    async with RedisClient(own_server.admin_url, connections=1, timeout=SHORT) as redis_client:
        await redis_client.execute("PING")
        pause(own_server)
        callers = [asyncio.create_task(redis_client.execute("NO-SUCH-COMMAND")) for _ in range(2)]
        await asyncio.sleep(0)
        callers[0].cancel()
        with pytest.raises(StoreUnavailable):
            await callers[1]
        resume(own_server)
        await wait_until(lambda: _answers(redis_client), "it answers again")


async def test_who_still_waits_at_the_end_is_told_and_who_comes_later_too(own_server: RedisServer) -> None:
    async with RedisClient(own_server.admin_url, connections=1, timeout=timedelta(seconds=20)) as redis_client:
        await redis_client.execute("PING")
        pause(own_server)
        under_servers = asyncio.create_task(redis_client.execute("PING"))
        await wait_until(lambda: _all_sent(redis_client), "it is sent")
        waiting = asyncio.create_task(redis_client.execute("PING"))
        await asyncio.sleep(0)
    for asked in (under_servers, waiting):
        with pytest.raises(StoreUnavailable):
            await asked
    with pytest.raises(StoreUnavailable, match="closed"):
        await redis_client.execute("PING")


@asynccontextmanager
async def server_that_says(words: bytes) -> AsyncIterator[str]:
    """A service in the place of Redis that sends this to every client."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(4096):
            writer.write(words)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"


@pytest.mark.parametrize("words", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x15\x03\x01\x00\x02\x02F", b"$5\r\nab"])
async def test_something_else_where_redis_should_be_is_no_redis(words: bytes) -> None:
    reader = None
    async with server_that_says(words) as url, RedisClient(url, connections=2, timeout=SHORT) as redis_client:
        for _ in range(3):  # more often than there are connections: all are still usable
            with pytest.raises(StoreUnavailable):
                await redis_client.execute("PING")
        reader = BlockingReader(url, block=SHORT, timeout=SHORT)
        with pytest.raises(StoreUnavailable):
            await reader.execute("PING")
        await reader.aclose()


async def test_the_reader_blocks_for_as_long_as_it_may(redis_server: RedisServer) -> None:
    reader = BlockingReader(redis_server.admin_url, block=timedelta(seconds=2), timeout=SHORT)
    assert await reader.execute("BLPOP", "nothing", "1.5") is None  # longer than the timeout
    with pytest.raises(StoreRefused):
        await reader.execute("XREADGROUP", "GROUP", "g", "c", "STREAMS", "s", ">")
    await reader.aclose()


async def test_the_reader_notices_a_hung_server(own_server: RedisServer) -> None:
    reader = BlockingReader(own_server.admin_url, block=SHORT, timeout=SHORT)
    assert await reader.execute("ECHO", "1") == "1"
    pause(own_server)
    with pytest.raises(StoreUnavailable):
        await reader.execute("ECHO", "2")
    resume(own_server)
    assert await reader.execute("ECHO", "3") == "3"
    own_server.kill()
    with pytest.raises(StoreUnavailable):
        await reader.execute("ECHO", "4")
    own_server.start()
    assert await reader.execute("ECHO", "5") == "5"
    await reader.aclose()


async def test_a_cancelled_caller_of_the_reader_ends_wherever_it_stands(redis_server: RedisServer) -> None:
    reader = BlockingReader(redis_server.admin_url, block=SHORT, timeout=SHORT)
    await reader.execute("PING")
    for ticks in range(40):
        caller = asyncio.create_task(reader.execute("PING"))
        for _ in range(ticks):
            await asyncio.sleep(0)
        if not caller.done():
            caller.cancel()
            await asyncio.wait([caller])
            assert caller.cancelled(), f"cancelled after {ticks} ticks, it went on"
    assert await reader.execute("ECHO", "fine") == "fine"
    await reader.aclose()


async def test_a_cancelled_caller_behind_a_blocked_read_does_not_end_it(redis_server: RedisServer) -> None:
    reader = BlockingReader(redis_server.admin_url, block=timedelta(seconds=10), timeout=timedelta(seconds=10))
    async with RedisClient(redis_server.admin_url, connections=1, timeout=timedelta(seconds=10)) as others:
        blocked = asyncio.create_task(reader.execute("BLPOP", "behind", 10))
        await wait_until_blocked(others)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await reader.execute("ECHO", "never sent")
        await others.execute("RPUSH", "behind", "delivered")
        assert await blocked == ["behind", "delivered"]
        assert await reader.execute("ECHO", "fine") == "fine"
    await reader.aclose()


async def test_lanes_end_wherever_they_stand(redis_server: RedisServer) -> None:
    for ticks in range(40):
        async with (
            asyncio.timeout(10),
            RedisClient(redis_server.admin_url, connections=1, timeout=SHORT) as redis_client,
        ):
            await redis_client.execute("PING")
            callers = [asyncio.create_task(redis_client.execute("PING")) for _ in range(3)]
            for _ in range(ticks):
                await asyncio.sleep(0)
        for answer in await asyncio.gather(*callers, return_exceptions=True):
            assert answer is True or answer == "PONG" or isinstance(answer, StoreUnavailable)


async def wait_until_blocked(redis_client: RedisClient) -> None:
    async with asyncio.timeout(10):
        while "blocked_clients:1" not in await redis_client.execute("INFO", "clients"):  # noqa: ASYNC110 - of Redis
            await asyncio.sleep(0.01)
