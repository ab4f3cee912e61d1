"""Commands reach Redis in shared pipelines, with a timeout, and are never repeated."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta

import pytest
import redis

from imstream.errors import StoreFull, StoreRefused, StoreUnavailable
from imstream.redis import pipeline
from imstream.redis.client import BlockingReader, RedisClient
from imstream.store.scripts import LUA
from tests.redis.conftest import Store
from tests.support.letting_go import lets_go
from tests.support.processes import free_port
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until

TIMEOUT = timedelta(seconds=5)


@pytest.fixture
async def redis_client(redis_server: RedisServer) -> AsyncIterator[RedisClient]:
    """A client with two connections."""
    async with RedisClient(redis_server.admin_url, connections=2, timeout=TIMEOUT) as redis_client:
        yield redis_client


async def test_each_caller_gets_the_answer_to_its_own_command(redis_client: RedisClient) -> None:
    answers = await asyncio.gather(*(redis_client.execute("ECHO", f"{n} 你好") for n in range(300)))
    assert answers == [f"{n} 你好" for n in range(300)]


async def test_commands_of_one_tick_travel_together(redis_server: RedisServer, store: Store) -> None:
    def reads() -> int:
        """Number of reads by the server; this request counts as one."""
        return int(store.redis.info("stats")["total_reads_processed"])

    async with RedisClient(redis_server.admin_url, connections=4, timeout=timedelta(seconds=5)) as redis_client:
        await redis_client.execute("PING")
        for together in (1, 2, 50):
            before = reads()
            await asyncio.gather(*(redis_client.execute("ECHO", n) for n in range(together)))
            assert reads() - before == 1 + 1


async def test_a_command_without_hurry_travels_with_the_next_one_and_before_it(
    redis_server: RedisServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "MAX_BATCH_DELAY", 30.0)
    async with RedisClient(redis_server.admin_url, connections=4, timeout=timedelta(seconds=5)) as redis_client:
        not_urgent = asyncio.create_task(redis_client.execute("RPUSH", "t:order", "not urgent", urgent=False))
        await asyncio.sleep(0)
        assert await redis_client.execute("RPUSH", "t:order", "next") == 2
        assert await not_urgent == 1
    assert store.redis.lrange("t:order", 0, -1) == ["not urgent", "next"]
    store.redis.delete("t:order")


async def test_a_command_without_hurry_does_not_wait_for_ever(redis_client: RedisClient) -> None:
    assert await asyncio.gather(*(redis_client.execute("ECHO", n, urgent=False) for n in "ab")) == ["a", "b"]
    assert await redis_client.execute("ECHO", "again", urgent=False) == "again"


async def test_a_batch_is_bounded_and_the_rest_takes_the_next_one(
    redis_client: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "MAX_BATCH", 7)
    assert await asyncio.gather(*(redis_client.execute("ECHO", str(n)) for n in range(100))) == [
        str(n) for n in range(100)
    ]


async def test_while_one_lane_waits_the_others_carry_on(redis_server: RedisServer, store: Store) -> None:
    async with RedisClient(redis_server.admin_url, connections=2, timeout=timedelta(minutes=1)) as redis_client:
        blocked = asyncio.create_task(redis_client.execute("BLPOP", "t:blocked", 0))
        await wait_until(
            lambda: any(one["cmd"] == "blpop" for one in store.redis.client_list()), "one connection waits"
        )
        answers = [await redis_client.execute("ECHO", str(n)) for n in range(20)]
        assert answers == [str(n) for n in range(20)]
        assert not blocked.done()
        store.redis.rpush("t:blocked", "x")
        assert await blocked == ["t:blocked", "x"]


async def test_a_refused_command_fails_alone(redis_client: RedisClient) -> None:
    results = await asyncio.gather(
        redis_client.execute("SET", "k", "text", "PX", 1000),
        redis_client.execute("HGET", "k", "field"),
        redis_client.execute("NO-SUCH-COMMAND"),
        redis_client.execute("GET", "k"),
        return_exceptions=True,
    )
    assert isinstance(results[1], StoreRefused)
    assert "WRONGTYPE" in str(results[1])
    assert isinstance(results[2], StoreRefused)
    assert results[3] == "text"


async def test_a_refused_command_lets_go_of_who_asked(redis_client: RedisClient, redis_server: RedisServer) -> None:
    assert await lets_go(lambda _: redis_client.execute("NO-SUCH-COMMAND"))
    reader = BlockingReader(redis_server.admin_url, block=TIMEOUT, timeout=TIMEOUT)
    assert await lets_go(lambda _: reader.execute("NO-SUCH-COMMAND"))
    await reader.aclose()


@pytest.mark.parametrize("argument", [None, object(), ["list"]])
async def test_a_command_that_cannot_be_sent_is_its_callers_error_alone(
    redis_client: RedisClient, argument: object
) -> None:
    results = await asyncio.gather(
        redis_client.execute("ECHO", "before"),
        redis_client.execute("ECHO", argument),  # type: ignore[arg-type]
        redis_client.execute("ECHO", "after"),
        return_exceptions=True,
    )
    assert isinstance(results[1], TypeError)
    assert (results[0], results[2]) == ("before", "after")
    assert await asyncio.gather(*(redis_client.execute("ECHO", n) for n in "abc")) == ["a", "b", "c"]


async def test_text_that_is_no_unicode_is_sent_with_marks_in_its_place(redis_client: RedisClient) -> None:
    assert await redis_client.execute("ECHO", "a\ud800b") == "a?b"


async def test_text_in_redis_that_is_no_utf8_does_no_harm(redis_client: RedisClient) -> None:
    assert await redis_client.execute("ECHO", b"a\xffb") == "a\ufffdb"


async def test_a_write_at_maxmemory_is_told_from_an_absence(redis_client: RedisClient, store: Store) -> None:
    store.redis.config_set("maxmemory", 1)
    with pytest.raises(StoreFull):
        await redis_client.execute("SET", "k", "v")
    with pytest.raises(StoreFull):
        await LUA["notify"].run(redis_client, ("k",), (1000, 1000, "n", 1))
    assert await redis_client.execute("GET", "k") is None


async def test_a_replica_that_cannot_be_written_is_as_good_as_away(redis_client: RedisClient, store: Store) -> None:
    store.redis.replicaof("127.0.0.1", str(free_port()))
    try:
        with pytest.raises(StoreUnavailable, match="read only replica"):
            await redis_client.execute("SET", "k", "v")
        with pytest.raises(StoreUnavailable, match="read only replica"):
            await LUA["notify"].run(redis_client, ("k",), (1000, 1000, "n", 1))
    finally:
        store.redis.replicaof("no", "one")


async def test_a_server_that_cannot_persist_is_as_good_as_away(own_server: RedisServer) -> None:
    with own_server.client() as client:
        client.config_set("save", "1 1")
        client.set("k", "v")
        shutil.rmtree(own_server.folder)  # the folder of its snapshots
        await wait_until(lambda: _cannot_save(client), "a save has failed")
    async with RedisClient(own_server.admin_url, connections=1, timeout=TIMEOUT) as redis_client:
        with pytest.raises(StoreUnavailable, match="MISCONF"):
            await redis_client.execute("SET", "k", "v")
        with pytest.raises(StoreUnavailable, match="MISCONF"):
            await LUA["notify"].run(redis_client, ("k2",), (1000, 1000, "n", 1))
    own_server.kill()  # it does not stop before a save succeeds


def _cannot_save(client: redis.Redis) -> bool:
    info: dict[str, object] = client.info("persistence")
    if info["rdb_last_bgsave_status"] == "ok" and not info["rdb_bgsave_in_progress"]:
        with suppress(redis.ResponseError):
            client.bgsave()
    return info["rdb_last_bgsave_status"] == "err"


async def test_a_script_is_sent_in_full_only_to_a_server_that_does_not_know_it(
    redis_client: RedisClient, store: Store
) -> None:
    script = LUA["redis_restarted"]
    store.redis.script_flush()
    for n in range(3):
        assert await script.run(redis_client, (f"im:{{node:{n}}}:redis",), ()) == 0
    stats = store.redis.info("commandstats")
    store.redis.script_flush()
    store.redis.config_resetstat()
    for _ in range(2):
        assert await script.run(redis_client, ("im:{node:4}:redis",), ()) == 0
    stats = store.redis.info("commandstats")
    assert stats["cmdstat_eval"]["calls"] == 1
    assert stats["cmdstat_evalsha"]["calls"] == 2


async def test_a_caller_that_leaves_takes_nothing_from_the_others(redis_client: RedisClient) -> None:
    callers = [asyncio.create_task(redis_client.execute("ECHO", str(n))) for n in range(10)]
    await asyncio.sleep(0)
    for caller in callers[::2]:
        caller.cancel()
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert results[1::2] == ["1", "3", "5", "7", "9"]
    assert all(isinstance(result, asyncio.CancelledError) for result in results[::2])
