"""Sentinel promotes another server: connections follow it, and nothing that it has is lost."""

import asyncio
import signal
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from imstream.errors import StoreError, StoreUnavailable
from imstream.redis.client import BlockingReader, RedisClient
from tests.redis.writing import LIMIT, writing
from tests.support.processes import free_port
from tests.support.redis_sets import SERVICE, SentinelSet, sentinel_set
from tests.support.servers import RedisServer
from tests.support.waiting import SLOW, wait_until

TIMEOUT = timedelta(milliseconds=500)
BLOCK = timedelta(milliseconds=300)
READ = ("XREADGROUP", "GROUP", "g", "c", "COUNT", 1, "BLOCK", 300, "STREAMS", "s", ">")


@pytest.fixture
def sentinels(tmp_path: Path) -> Iterator[SentinelSet]:
    """A master and a replica of the test's own, and three Sentinels."""
    with sentinel_set(tmp_path) as made:
        yield made


async def test_what_was_replicated_is_there_after_the_master_was_killed_and_writing_goes_on(
    sentinels: SentinelSet,
) -> None:
    async with RedisClient(sentinels.admin_url, connections=2, timeout=TIMEOUT) as redis_client:
        async with writing(redis_client, "s") as [writer]:
            old, new = sentinels.master, sentinels.replica
            confirmed_before = len(writer.confirmed)
            old.kill()
            await wait_until(lambda: _is_master(new), "the replica is the master", limit=LIMIT)
            await writer.goes_on()
        # Replication is asynchronous: only the last confirmed entries may be missing.
        with new.client() as client:
            present = writer.in_redis(client)
        before, after = writer.confirmed[:confirmed_before], writer.confirmed[confirmed_before:]
        kept = [number for number in before if number in set(present)]
        assert kept == before[: len(kept)]
        assert len(before) - len(kept) < 20
        assert set(after[-20:]) <= set(present)
        assert len(present) == len(set(present))


async def test_commands_and_reader_are_on_the_new_master_within_two_seconds(sentinels: SentinelSet) -> None:
    reader = BlockingReader(sentinels.admin_url, block=BLOCK, timeout=TIMEOUT)
    async with RedisClient(sentinels.admin_url, connections=2, timeout=TIMEOUT) as redis_client:
        await redis_client.execute("XGROUP", "CREATE", "s", "g", "0", "MKSTREAM")
        new = sentinels.replica
        with new.client() as client:
            await wait_until(lambda: client.exists("s"), "the replica has the group")
        sentinels.master.kill()
        with pytest.raises(StoreUnavailable):
            await reader.execute(*READ)
        await wait_until(lambda: _is_master(new), "the replica is the master", limit=LIMIT)
        began = asyncio.get_running_loop().time()
        await wait_until(lambda: _is_done(redis_client, "XADD", "s", "*", "n", 1), "commands reach it", limit=LIMIT)
        [entry] = (await _answer(reader, *READ))["s"]
        assert entry[1] == ["n", "1"]
        assert asyncio.get_running_loop().time() - began < 2 * SLOW + BLOCK.total_seconds()
    await reader.aclose()


async def test_a_blocked_reader_follows_a_master_that_is_replaced_in_good_order(sentinels: SentinelSet) -> None:
    reader = BlockingReader(sentinels.admin_url, block=timedelta(seconds=60), timeout=TIMEOUT)
    async with RedisClient(sentinels.admin_url, connections=2, timeout=TIMEOUT) as redis_client:
        await redis_client.execute("XGROUP", "CREATE", "s", "g", "0", "MKSTREAM")
        blocked = asyncio.create_task(reader.execute(*READ[:-4], 60_000, *READ[-3:]))
        old, new = sentinels.master, sentinels.replica
        with old.client() as client:
            await wait_until(lambda: "xreadgroup" in [one["cmd"] for one in client.client_list()], "it is blocked")
        with new.client() as client:
            await wait_until(lambda: client.exists("s"), "the replica has the group")
            await asyncio.to_thread(sentinels.fail_over)
        with pytest.raises(StoreUnavailable):  # not GroupMissing
            await blocked
        await wait_until(lambda: _is_master(new), "the replica is the master", limit=LIMIT)
        await wait_until(lambda: _is_done(redis_client, "XADD", "s", "*", "n", 1), "commands reach it", limit=LIMIT)
        with new.client() as client:
            assert client.xlen("s") >= 1  # one more for each whose answer came too late
        assert await _answer(reader, *READ)
    await reader.aclose()


async def test_a_master_that_hangs_is_replaced_and_its_connections_are_not_used_when_it_wakes_up(
    sentinels: SentinelSet,
) -> None:
    old, new = sentinels.master, sentinels.replica
    assert old.process is not None
    async with (
        RedisClient(sentinels.admin_url, connections=2, timeout=TIMEOUT) as redis_client,
        writing(redis_client, "s") as [writer],
    ):
        old.process.signal(signal.SIGSTOP)
        await wait_until(lambda: _is_master(new), "the replica is the master", limit=LIMIT)
        await writer.goes_on()
        since = len(writer.confirmed)
        old.process.signal(signal.SIGCONT)
        await wait_until(lambda: not _is_master(old), "the old master is a replica", limit=LIMIT)
        await writer.goes_on()
        with new.client() as client:
            assert set(writer.confirmed[since:]) <= set(writer.in_redis(client))
        assert writer.longest < 2 * TIMEOUT.total_seconds() + SLOW


async def test_the_master_is_found_while_the_first_sentinel_hangs(sentinels: SentinelSet) -> None:
    sentinels.sentinels[0].signal(signal.SIGSTOP)
    async with RedisClient(sentinels.admin_url, connections=4, timeout=timedelta(seconds=2)) as redis_client:
        assert await redis_client.execute("SET", "k", "v")


async def test_without_a_sentinel_or_with_another_name_the_master_is_not_there(sentinels: SentinelSet) -> None:
    nobody = f"redis+sentinel://127.0.0.1:{free_port()}/{SERVICE}"
    other = sentinels.admin_url.replace(f"/{SERVICE}/", "/other/")
    for url in (nobody, other):
        reader = BlockingReader(url, block=BLOCK, timeout=TIMEOUT)
        async with RedisClient(url, connections=2, timeout=TIMEOUT) as redis_client:
            for ask in (redis_client.execute, reader.execute):
                with pytest.raises(StoreUnavailable, match="No master found for"):
                    await ask("PING")
        await reader.aclose()


async def test_a_reader_that_is_blocked_as_its_server_is_demoted_is_told_that_redis_is_away(
    own_server: RedisServer,
) -> None:
    reader = BlockingReader(own_server.admin_url, block=timedelta(seconds=20), timeout=TIMEOUT)
    with own_server.client() as client:
        client.xgroup_create("s", "g", "0", mkstream=True)
        blocked = asyncio.create_task(reader.execute(*READ[:-4], 20_000, *READ[-3:]))
        await wait_until(lambda: "xreadgroup" in [one["cmd"] for one in client.client_list()], "it is blocked")
        client.replicaof("127.0.0.1", free_port())
        with pytest.raises(StoreUnavailable):  # not GroupMissing
            await blocked
    await reader.aclose()


@pytest.mark.parametrize("command", [("XADD", "s", "*", "a", "b"), ("EVAL", "redis.call('SET', KEYS[1], 1)", 1, "k")])
async def test_a_connection_to_a_server_that_is_no_longer_the_master_is_given_up(
    own_server: RedisServer, command: tuple[str | int, ...]
) -> None:
    reader = BlockingReader(own_server.admin_url, block=BLOCK, timeout=TIMEOUT * SLOW)
    async with RedisClient(own_server.admin_url, connections=1, timeout=TIMEOUT * SLOW) as redis_client:
        before = await redis_client.execute("CLIENT", "ID"), await reader.execute("CLIENT", "ID")
        with own_server.client() as client:
            client.replicaof("127.0.0.1", free_port())
        for ask in (redis_client.execute, reader.execute):
            with pytest.raises(StoreUnavailable, match="read only replica"):
                await ask(*command)
        after = await redis_client.execute("CLIENT", "ID"), await reader.execute("CLIENT", "ID")
        assert not set(before) & set(after)
    await reader.aclose()


def _is_master(server: RedisServer) -> bool:
    with server.client() as client:
        info = client.info("replication")
        assert isinstance(info, dict)
        return bool(info["role"] == "master")


async def _is_done(redis_client: RedisClient, *command: str | int) -> bool:
    try:
        await redis_client.execute(*command)
    except StoreError:
        return False
    return True


async def _answer(reader: BlockingReader, *command: str | int) -> dict[str, list[list[object]]]:
    """The reader's first reply. A dead connection is noticed by the first command that uses it."""
    answers = []

    async def ask() -> bool:
        try:
            answers.append(await reader.execute(*command))
        except StoreUnavailable:
            return False
        return bool(answers[-1])

    await wait_until(ask, "the reader reads", limit=LIMIT)
    answer: dict[str, list[list[object]]] = answers[-1]
    return answer
