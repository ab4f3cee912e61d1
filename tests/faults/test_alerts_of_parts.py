"""Alerts besides those of the drill: each is fired by its fault in a real Prometheus, with the part that it blames."""

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from imstream.keys import Keys
from tests.support.backend_scripts import breaks_off
from tests.support.drill import Drill, converse, drill, running
from tests.support.scripted_backend import Exchange, Script, chunk, event, refuses, streams
from tests.support.servers import RedisServer
from tests.support.stage import fresh_redis

pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]  # the short relative: tests/unit/test_prometheus.py

LEASE = Keys().lease("0")

NO_MODEL = '{"error": {"message": "The model `demo` does not exist", "code": "model_not_found"}}'
TOO_LONG = '{"error": {"message": "too long", "code": "context_length_exceeded"}}'


async def lasts(exchange: Exchange) -> None:
    """A script: an answer that takes a while."""
    await asyncio.sleep(5)
    await streams("At ", "last")(exchange)


@pytest.mark.parametrize(
    ("script", "share", "alert"),
    [
        (refuses(404, NO_MODEL), 1, "ImstreamAIMisconfigured"),
        (refuses(502, "<html>"), 1, "ImstreamAIBackendAway"),
        (breaks_off(event(chunk("Half "))), 2, "ImstreamAIErrors"),
    ],
)
async def test_a_backend_is_blamed_by_the_way_it_fails(
    redis_server: RedisServer, tmp_path: Path, script: Script, share: int, alert: str
) -> None:
    async with drill(tmp_path, redis_server, ai_breaker_failures=5) as play:
        play.backend.faulty = lambda call: script if call % share == 0 else None
        await play.fires(alert, part="ai", watch=0)


async def test_messages_that_fail_and_are_given_up_are_reported_without_a_cause(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with drill(tmp_path, redis_server) as play:
        play.backend.faulty = lambda call: refuses(400, TOO_LONG) if call % 3 == 0 else None
        await play.fires("ImstreamAnswersFail", "ImstreamDeadLetters", part="answers", watch=0)
        assert (await play.shows("Availability of answers"))[""] < 0.95


async def test_more_questions_than_slots_wait_and_are_refused(redis_server: RedisServer, tmp_path: Path) -> None:
    async with drill(tmp_path, redis_server, concurrency=2, queue_limit=10) as play:
        play.backend.faulty = lambda _: lasts
        async with running(*(converse(play.nodes[0], 20001 + number) for number in range(20))):
            await play.fires("ImstreamRequestsWait", "ImstreamQueueFull", part="answers", watch=0)


async def test_failures_that_are_too_few_for_a_page_are_reported_when_they_go_on(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    # Only its wait of 5 minutes is shorter, and its window of an hour has the data of the test.
    async with drill(tmp_path, redis_server, waits={"ImstreamErrorBudgetBurns": "30s"}) as play:
        play.backend.faulty = lambda call: refuses(400, TOO_LONG) if call % 25 == 0 else None
        async with running(*(converse(play.nodes[0], 20001 + number) for number in range(6))):
            await play.fires("ImstreamErrorBudgetBurns", part="answers", watch=0, within=180)
        pages = 'count_over_time(ALERTS{alertname="ImstreamAnswersFail",alertstate="firing"}[10m])'
        assert await play.watching.query(pages) == []
        assert 0.95 < (await play.shows("Availability of answers"))[""] < 0.99


async def test_a_redis_that_does_not_answer_is_down_and_the_nodes_are_not(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with drill(tmp_path, redis_server) as play:
        play.proxy.swallow()
        await play.fires("ImstreamRedisDown", part="redis")
        assert set((await play.shows("Redis answers")).values()) == {0}


async def test_a_redis_without_memory_is_distinguished_from_a_full_queue(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with drill(tmp_path, redis_server) as play:
        play.nodes[0].redis.config_set("maxmemory", 1)
        try:
            await play.fires("ImstreamRedisMemory", part="redis", watch=0)
        finally:
            play.nodes[0].redis.config_set("maxmemory", 0)
        assert (await play.shows("Refused by Redis"))["memory"] > 0


async def test_refusals_of_a_redis_that_cannot_write_its_snapshot_are_attributed_to_it(tmp_path: Path) -> None:
    with fresh_redis(tmp_path) as server, server.client() as client:
        async with drill(tmp_path, server) as play:
            client.config_set("save", "1 1")
            shutil.rmtree(server.folder)
            await play.fires("ImstreamRedisDisk", part="redis", watch=0)
            assert (await play.shows("Refused by Redis"))["disk"] > 0
        server.kill()  # it does not stop before a save succeeds


async def test_a_node_that_is_killed_is_down_and_another_one_adopts_its_stream(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with drill(tmp_path, redis_server, "a", "b") as play:
        play.backend.faulty = lambda _: lasts
        await asyncio.sleep(2)  # all users have asked again
        await play.nodes[0].killed()
        await play.fires("ImstreamNodeDown", "ImstreamStreamAdopted", part="node", watch=0)


async def test_when_all_nodes_have_ended_their_end_is_the_cause(redis_server: RedisServer, tmp_path: Path) -> None:
    async with drill(tmp_path, redis_server, "a", "b") as play:
        await asyncio.gather(*(node.terminated() for node in play.nodes))
        await play.fires("ImstreamNoNodes", "ImstreamNodeDown", part="node", watch=0)


async def test_a_node_whose_lease_is_overwritten_has_lost_it_and_redis_is_not_down(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with drill(tmp_path, redis_server) as play:
        [node] = play.nodes
        node.redis.delete(LEASE)
        node.redis.lpush(LEASE, "something that is no lease")
        node.redis.expire(LEASE, 300)
        await play.fires("ImstreamLeaseLost", part="node")
        assert node.now.process.process.poll() is None
        assert set((await play.shows("Redis answers")).values()) == {1}


async def test_a_node_without_cpu_is_blamed_itself_and_not_redis(redis_server: RedisServer, tmp_path: Path) -> None:
    async with drill(tmp_path, redis_server) as play, starved(play):
        await play.fires("ImstreamLoopLag", part="node")


@asynccontextmanager
async def starved(play: Drill) -> AsyncIterator[None]:
    """Let a node run for a fifth of the time only."""

    async def stop_and_go() -> None:
        process = play.nodes[0].now.process
        try:
            while True:
                process.signal(signal.SIGSTOP)
                await asyncio.sleep(0.8)
                process.signal(signal.SIGCONT)
                await asyncio.sleep(0.2)
        finally:
            process.signal(signal.SIGCONT)

    async with running(stop_and_go()):
        yield
