"""Redis Cluster: commands reach the owner of their key, also while slots move and masters die. None is repeated."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from imstream.errors import StoreError, StoreRefused, StoreUnavailable
from imstream.keys import Keys
from imstream.model import Terminal
from imstream.redis import pipeline
from imstream.redis.client import BlockingReader, RedisClient
from imstream.settings import Settings
from imstream.store.dead_letters import DeadLetterOffice, Selection
from imstream.store.replies import Opened, ReplyStore
from tests.conftest import SERVERS
from tests.redis.writing import LIMIT, SCRIPT, writing
from tests.support.processes import free_port
from tests.support.redis_sets import ClusterSet, cluster_set
from tests.support.servers import RedisServer, missing
from tests.support.tcp_proxy import tcp_proxy
from tests.support.waiting import SLOW, wait_until

TIMEOUT = timedelta(milliseconds=500)
BLOCK = timedelta(milliseconds=300)


@pytest.fixture(scope="module", params=["valkey", "redis-7.0"])
def shared_cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterSet]:
    """A cluster shared by the tests that kill nothing."""
    binary = SERVERS[request.param]()
    if binary is None:
        missing(request.param)
        return
    with cluster_set(tmp_path_factory.mktemp("cluster"), binary=binary) as made:
        yield made


@pytest.fixture
def cluster(shared_cluster: ClusterSet) -> ClusterSet:
    """The shared cluster, emptied."""
    for server in shared_cluster.masters:
        with server.client() as client:
            client.flushall()
            client.script_flush()
    return shared_cluster


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[ClusterSet]:
    """A cluster of the test's own, which it may damage."""
    with cluster_set(tmp_path) as made:
        yield made


@pytest.fixture
async def redis_client(cluster: ClusterSet) -> AsyncIterator[RedisClient]:
    """A client with two connections to each master."""
    # Nothing dies in these tests, so a long timeout avoids failures on a busy machine.
    async with RedisClient(cluster.admin_url, connections=2, timeout=TIMEOUT * 2 * SLOW) as made:
        yield made


def streams_of(cluster: ClusterSet) -> list[str]:
    """One requests stream on each master, in the order of the masters."""
    found: dict[int, str] = {}
    for number in range(100):
        stream = Keys().requests(str(number))
        found.setdefault(cluster.master_of(stream).port, stream)
        if len(found) == len(cluster.masters):
            break
    return [found[server.port] for server in cluster.masters]


async def test_every_command_finds_the_master_of_its_key(redis_client: RedisClient, cluster: ClusterSet) -> None:
    for stream, server in zip(streams_of(cluster), cluster.masters, strict=True):
        load = stream.replace("requests", "load")
        # The server does not know the script yet, and it has two keys.
        assert await SCRIPT.run(redis_client, (stream, load), ("g",)) == 1
        await redis_client.execute("XADD", stream, "*", "a", "b")
        read = await redis_client.execute("XREADGROUP", "GROUP", "g", "c", "STREAMS", stream, ">")
        assert read[stream][0][1] == ["a", "b"]
        assert await redis_client.execute("XINFO", "STREAM", stream)
        with server.client() as client:
            assert list(client.scan_iter()) == [stream]
    assert await redis_client.execute("PING") in {"PONG", True}
    assert set(await redis_client.execute_on_masters("DBSIZE")) == {f"127.0.0.1:{one.port}" for one in cluster.masters}
    with pytest.raises(StoreRefused, match="same slot"):
        await redis_client.execute("DEL", *streams_of(cluster))


async def test_dead_letters_on_any_master_are_found_and_retried(redis_client: RedisClient, cluster: ClusterSet) -> None:
    settings = Settings.load(redis_url=cluster.admin_url)
    office, replies = DeadLetterOffice(redis_client, settings), ReplyStore(redis_client, settings)
    nodes = sorted(stream.removeprefix("im:{node:").removesuffix("}:requests") for stream in streams_of(cluster))
    for node in nodes:
        await replies.open(10001, f"m{node}", request=f"{node}/1-0")
        failed = Terminal("failed", reason="x")
        await replies.append(10001, f"m{node}", attempt=1, before=0, after=0, text="", terminal=failed)
        letter = ("user", 10001, "message_id", f"m{node}", "contents", "why?", "attempts", 1)
        await redis_client.execute("XADD", Keys().dead(node), "*", *letter)
    assert await office.nodes() == nodes
    for node in nodes:
        [dead] = [letter async for letter in office.letters(node, Selection())]
        assert await office.has_reply(dead)
        assert await office.retry(dead) == "retried"
        [(entry_id, _)] = await redis_client.execute("XRANGE", Keys().requests(node), "-", "+")
        opened = await replies.open(10001, f"m{node}", request=f"{node}/{entry_id}", reopens=True)
        assert isinstance(opened, Opened)
        assert opened.attempt == 2


async def test_the_answers_of_many_at_once_are_not_mixed_up(redis_client: RedisClient) -> None:
    texts = [f"text {n}" for n in range(1000)]
    for n, text in enumerate(texts):
        await redis_client.execute("SET", f"k{n}", text)
    assert await asyncio.gather(*(redis_client.execute("GET", f"k{n}") for n in range(1000))) == texts


async def test_the_address_of_one_server_does_not_do_for_a_cluster_and_the_error_says_so(cluster: ClusterSet) -> None:
    for server in cluster.masters[:2]:
        async with RedisClient(server.admin_url, connections=1, timeout=TIMEOUT) as redis_client:
            key = next(stream for stream in streams_of(cluster) if cluster.master_of(stream) is not server)
            with pytest.raises(StoreRefused, match=r"begins with redis\+cluster://"):
                await redis_client.execute("XADD", key, "*", "a", "b")


# A slot moves


async def test_commands_go_on_while_a_slot_moves_there_and_back(redis_client: RedisClient, cluster: ClusterSet) -> None:
    stream = streams_of(cluster)[0]
    for target in (cluster.masters[1], cluster.masters[0]):
        async with writing(redis_client, stream) as [writer]:
            source = await asyncio.to_thread(cluster.begin_move, stream, target)
            await writer.goes_on()
            await asyncio.to_thread(cluster.move_keys, stream, source, target)
            await writer.goes_on()  # by ASKING
            await asyncio.to_thread(cluster.end_move, stream, target)
            await writer.goes_on()
        assert writer.unsure == []
        with cluster.client() as client:
            assert writer.in_redis(client) == writer.confirmed
            client.delete(stream)


@pytest.mark.parametrize("batch", [1, 2, 500])
async def test_a_batch_may_ask_for_keys_that_are_being_moved(
    redis_client: RedisClient, cluster: ClusterSet, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(pipeline, "MAX_BATCH", batch)
    tag = streams_of(cluster)[2]
    target = cluster.masters[0]
    source = cluster.begin_move(tag, target)
    keys = [f"{tag}:{n}" for n in range(50)]
    assert await asyncio.gather(*(redis_client.execute("APPEND", key, "x") for key in keys)) == [1] * 50
    assert await asyncio.gather(*(redis_client.execute("APPEND", key, "x") for key in keys)) == [2] * 50
    with target.client() as client:
        assert client.dbsize() == 50
    cluster.move_keys(tag, source, target)
    cluster.end_move(tag, target)
    assert await asyncio.gather(*(redis_client.execute("GET", key) for key in keys)) == ["xx"] * 50
    cluster.move(tag, source)
    assert await asyncio.gather(*(redis_client.execute("GET", key) for key in keys)) == ["xx"] * 50


async def test_a_script_whose_keys_are_apart_for_a_moment_is_unavailable_for_that_moment(
    redis_client: RedisClient, cluster: ClusterSet
) -> None:
    stream = streams_of(cluster)[1]
    keys = (stream, stream.replace("requests", "load"))
    await redis_client.execute("HSET", keys[1], "10001", 1)
    assert await SCRIPT.run(redis_client, keys, ("g",)) == 1
    await redis_client.execute("HSET", keys[1], "10001", 1)
    target = cluster.masters[2]
    source = cluster.begin_move(stream, target)
    cluster.move_keys(stream, source, target, most=1)
    with pytest.raises(StoreUnavailable):
        await SCRIPT.run(redis_client, keys, ("g",))
    cluster.move_keys(stream, source, target)
    assert await SCRIPT.run(redis_client, keys, ("g",)) == 0  # the group exists; the target has loaded the script
    cluster.end_move(stream, target)
    assert await SCRIPT.run(redis_client, keys, ("g",)) == 0
    cluster.move(stream, source)
    assert await SCRIPT.run(redis_client, keys, ("g",)) == 0


@pytest.mark.parametrize("filled", [False, True], ids=["empty", "read to its end"])
async def test_a_blocked_reader_follows_its_stream_when_the_slot_moves(
    redis_client: RedisClient, cluster: ClusterSet, *, filled: bool
) -> None:
    stream, target = streams_of(cluster)[0], cluster.masters[1]
    reader = BlockingReader(cluster.admin_url, block=timedelta(seconds=10), timeout=TIMEOUT)
    read = ("XREADGROUP", "GROUP", "g", "c", "COUNT", 1, "BLOCK", 10_000, "STREAMS", stream, ">")
    await redis_client.execute("XGROUP", "CREATE", stream, "g", "0", "MKSTREAM")
    if filled:
        await redis_client.execute("XADD", stream, "*", "n", 1)
        assert await reader.execute(*read)
    source = cluster.master_of(stream)
    for there in (target, source):
        blocked = asyncio.create_task(reader.execute(*read))
        await _is_blocked(cluster.master_of(stream))
        await asyncio.to_thread(cluster.move, stream, there)
        await redis_client.execute("XADD", stream, "*", "n", 2)
        assert (await blocked)[stream][0][1] == ["n", "2"]
    await reader.aclose()


async def test_a_blocked_reader_is_told_when_its_stream_was_deleted(
    redis_client: RedisClient, cluster: ClusterSet
) -> None:
    stream = streams_of(cluster)[0]
    reader = BlockingReader(cluster.admin_url, block=timedelta(seconds=10), timeout=TIMEOUT)
    await redis_client.execute("XGROUP", "CREATE", stream, "g", "0", "MKSTREAM")
    read = ("XREADGROUP", "GROUP", "g", "c", "COUNT", 1, "BLOCK", 10_000, "STREAMS", stream, ">")
    blocked = asyncio.create_task(reader.execute(*read))
    await _is_blocked(cluster.masters[0])
    await redis_client.execute("DEL", stream)
    with pytest.raises(StoreRefused, match="NOGROUP"):
        await blocked
    await reader.aclose()


# A master dies


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_master_that_dies_or_hangs_costs_the_others_nothing_and_its_replica_takes_over(
    own_cluster: ClusterSet, number: signal.Signals
) -> None:
    streams, timeout = streams_of(own_cluster), TIMEOUT * SLOW  # no command to a living master may be late
    reader = BlockingReader(own_cluster.admin_url, block=BLOCK, timeout=timeout)
    async with RedisClient(own_cluster.admin_url, connections=2, timeout=timeout) as redis_client:
        await redis_client.execute("XGROUP", "CREATE", streams[0], "g", "$", "MKSTREAM")
        with own_cluster.replicas[0].client() as client:
            await wait_until(client.dbsize, "the replica has the group")
        async with writing(redis_client, *streams) as [dead, *alive]:
            confirmed_before = len(dead.confirmed)
            process = own_cluster.masters[0].process
            assert process is not None
            process.signal(number)
            await wait_until(lambda: _is_master(own_cluster.replicas[0]), "the replica is a master", limit=LIMIT)
            began = asyncio.get_running_loop().time()
            await dead.goes_on()
            assert asyncio.get_running_loop().time() - began < 2 * SLOW + timeout.total_seconds()
            assert dead.unsure
            for writer in alive:
                assert writer.unsure == []
                await writer.goes_on()
            read = ("XREADGROUP", "GROUP", "g", "c", "BLOCK", 300, "STREAMS", streams[0], ">")
            await wait_until(lambda: _is_done(reader, *read), "the reader reads there", limit=LIMIT)
        assert dead.longest < 2 * timeout.total_seconds() + SLOW
        with own_cluster.replicas[0].client() as client:
            present = dead.in_redis(client)
        before, after = dead.confirmed[:confirmed_before], dead.confirmed[confirmed_before:]
        kept = [n for n in before if n in set(present)]
        assert kept == before[: len(kept)]  # replication is asynchronous: the last ones may be missing
        assert len(before) - len(kept) < 20
        assert set(after[-20:]) <= set(present)
        assert len(present) == len(set(present))
        for writer, server in zip(alive, own_cluster.masters[1:], strict=True):
            with server.client() as client:
                assert set(writer.confirmed) <= set(writer.in_redis(client))
    await reader.aclose()


async def test_a_master_without_a_replica_is_found_again_when_it_is_back(own_cluster: ClusterSet) -> None:
    stream = streams_of(own_cluster)[0]
    own_cluster.replicas[0].kill()
    async with RedisClient(own_cluster.admin_url, connections=2, timeout=TIMEOUT * SLOW) as redis_client:
        await redis_client.execute("XADD", stream, "*", "n", 1)
        own_cluster.masters[0].kill()
        for _ in range(3):
            with pytest.raises(StoreUnavailable):
                await redis_client.execute("XLEN", stream)
        own_cluster.masters[0].start()
        await wait_until(lambda: _is_done(redis_client, "XADD", stream, "*", "n", 2), "it is back", limit=LIMIT)
        assert await redis_client.execute("XLEN", stream) == 2


async def test_a_cluster_is_found_while_the_first_node_of_its_address_hangs(own_cluster: ClusterSet) -> None:
    first, stream = own_cluster.masters[0].process, streams_of(own_cluster)[1]
    assert first is not None
    first.signal(signal.SIGSTOP)
    for _ in range(5):  # the node that is asked first is chosen at random
        async with RedisClient(own_cluster.admin_url, connections=2, timeout=timedelta(seconds=SLOW)) as redis_client:
            assert await redis_client.execute("XLEN", stream) == 0


async def test_a_cluster_all_of_whose_nodes_were_replaced_is_found_under_the_names_that_were_given(
    own_cluster: ClusterSet, tmp_path: Path
) -> None:
    async with tcp_proxy(own_cluster.masters[0].port) as proxy:
        url = f"redis+cluster://admin:admin-secret@127.0.0.1:{proxy.port}"
        reader = BlockingReader(url, block=BLOCK, timeout=TIMEOUT * SLOW)
        async with RedisClient(url, connections=1, timeout=TIMEOUT * SLOW) as redis_client:
            await redis_client.execute("SET", "k", "old")
            assert await reader.execute("GET", "k") == "old"
            await asyncio.to_thread(own_cluster.stop)
            with cluster_set(tmp_path / "new") as new:
                proxy.target_port = new.masters[0].port
                await wait_until(lambda: _is_done(redis_client, "SET", "k", "new"), "commands reach it", limit=LIMIT)
                await wait_until(lambda: _is_done(reader, "GET", "k"), "the reader reaches it", limit=LIMIT)
                assert await reader.execute("GET", "k") == "new"
        await reader.aclose()


async def test_without_any_node_or_at_something_else_commands_and_reader_are_told_in_time(
    own_server: RedisServer,
) -> None:
    for url in (
        f"redis+cluster://127.0.0.1:{free_port()}",
        f"redis+cluster://admin:admin-secret@127.0.0.1:{own_server.port}",
    ):
        reader = BlockingReader(url, block=BLOCK, timeout=TIMEOUT)
        async with RedisClient(url, connections=1, timeout=TIMEOUT) as redis_client:
            for ask in (redis_client.execute, reader.execute):
                for _ in range(2):
                    with pytest.raises(StoreUnavailable, match="Redis Cluster"):
                        await ask("XLEN", "s")
        await reader.aclose()


ON_SERVERS = ["valkey"]


def _is_master(server: RedisServer) -> bool:
    with server.client() as client:
        info: Any = client.info("replication")
        return bool(info["role"] == "master")


async def _is_done(ask: RedisClient | BlockingReader, *command: str | int) -> bool:
    try:
        return bool(await ask.execute(*command))
    except StoreError:
        return False


async def _is_blocked(server: RedisServer) -> None:
    with server.client() as client:
        await wait_until(lambda: "xreadgroup" in [one["cmd"] for one in client.client_list()], "a reader is blocked")
