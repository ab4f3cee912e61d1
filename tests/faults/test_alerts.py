"""A drill: each fault fires its alert in a real Prometheus within a minute, and none that blames another part."""

import asyncio
import signal
from itertools import count
from pathlib import Path

import pytest

from tests.support.chatter import Chatter, chatter
from tests.support.drill import USERS, WITHIN, drill, highest, running
from tests.support.scripted_backend import Exchange, refuses, streams
from tests.support.servers import RedisServer

pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]  # the short relative: tests/unit/test_prometheus.py

BUSY = '{"error": {"message": "slow down", "code": "rate_limit_exceeded"}}'

SLOW_AI = 12.0
SLOW_REDIS = 0.15
"""Seconds that the faults take."""


async def slowly(exchange: Exchange) -> None:
    """A script: the answer begins late."""
    await asyncio.sleep(SLOW_AI)
    await streams("At ", "last")(exchange)


async def flood(flooder: Chatter) -> None:
    """Send messages far above the limit, until cancelled."""
    for number in count():
        await flooder.send(f"m{number}", "again and again")
        await asyncio.sleep(0.04)


async def test_an_ai_that_is_slow_for_some_is_blamed_for_late_answers(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with drill(tmp_path, redis_server) as play:
        play.backend.faulty = lambda call: slowly if call % 4 == 0 else None
        await play.fires("ImstreamAISlow", part="ai")
        assert highest(await play.shows("First text"), "p95") > 10
        assert highest(await play.shows("Queue wait"), "p95") < 1
        assert highest(await play.shows("Round trip"), "p95") < 0.1


async def test_an_overloaded_ai_is_distinguished_from_a_slow_one(redis_server: RedisServer, tmp_path: Path) -> None:
    async with drill(tmp_path, redis_server) as play:
        busy = refuses(429, BUSY, headers={"Retry-After": "1"})
        play.backend.faulty = lambda call: busy if call % 10 < 7 else None
        await play.fires("ImstreamAIOverloaded", part="ai")
        assert highest(await play.shows("Repeated calls, by reason"), "http_429") > 0.05
        assert highest(await play.shows("Calls, by result"), "away") > 0.05
        await play.shows("First text")


async def test_a_key_that_the_backend_refuses_is_named(redis_server: RedisServer, tmp_path: Path) -> None:
    async with drill(tmp_path, redis_server) as play:
        play.backend.key = "sk-another"
        await play.fires("ImstreamAIKeyRefused", part="ai")
        assert highest(await play.shows("Repeated calls, by reason"), "http_401") > 0
        assert highest(await play.shows("Breaker open"), "default") == 1
        assert (await play.shows("Backends away"))[""] == 1
        await play.shows("Requests")


async def test_a_slow_redis_is_blamed_and_not_the_nodes_or_the_ai_that_wait_for_it(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with drill(tmp_path, redis_server) as play:
        play.proxy.delay = SLOW_REDIS
        await play.fires("ImstreamRedisSlow", part="redis")
        assert highest(await play.shows("Round trip"), "p95") > 0.1
        assert highest(await play.shows("Event loop lag, p95")) < 0.25
        assert highest(await play.shows("Redis answers")) == 1


async def test_a_node_whose_consumer_hangs_is_named_and_the_other_one_is_not(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    wedged = ("-m", "tests.support.wedged_node")
    async with drill(tmp_path, redis_server, "a", "b", command=wedged) as play:
        play.nodes[0].now.process.signal(signal.SIGUSR1)
        # Requests begin beside the read that hangs until its slots are used, which takes the longer, the busier we are.
        await play.fires("ImstreamNodeStuck", part="node", within=2 * WITHIN)
        [blamed] = await play.watching.query('ALERTS{alertname="ImstreamNodeStuck",alertstate="firing"}')
        assert blamed.labels["stream"] == "a"
        waiting = await play.shows("Waiting requests")
        assert waiting["a"] >= USERS
        assert waiting["b"] < USERS
        assert (await play.shows("Oldest request"))["a"] > 10
        assert set((await play.shows("Redis answers")).values()) == {1}
        assert set((await play.shows("Lease and scrapes")).values()) == {1}


async def test_one_user_who_floods_is_reported_and_no_other_alert_fires(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with drill(tmp_path, redis_server) as play:
        url = play.nodes[0].now.ws()
        async with chatter(url, 20001) as flooder, running(flood(flooder)):
            await play.fires("ImstreamUserFlooding", part="clients")
            results = await play.shows("CHAT frames, by result")
            assert results["rate_limited"] > 10
            assert results["busy"] == results["unavailable"] == 0
            assert highest(await play.shows("First text"), "p95") < 5
            assert (await play.shows("Availability of answers"))[""] == 1
