"""Deliveries do not count as deaths when the worker was told to stop, or when Redis stopped together with it."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.redis.workshop import PlayedBackend, Workshop, workshop
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until

ON_SERVERS = ["valkey"]

QUICK_LEASE = "300ms"
TEXT = "some of it"


async def in_the_middle(shop: Workshop, *, ask: bool) -> None:
    """Wait until some text of an answer is recorded."""
    if ask:
        await shop.ask()
    call = await shop.backend.call(1)
    call.send(TEXT)
    await wait_until(lambda: shop.recorded_text() == TEXT, "some text is recorded")


async def begin_to_stop(shop: Workshop) -> None:
    """What a node does first on SIGTERM."""
    shop.consumer.stop()
    shop.adopter.stop()
    await asyncio.gather(shop.lease_keeper.mark_stopping(), shop.jobs.uncount_deliveries())


async def everything_is_stopped_again_and_again(own_server: RedisServer, rounds: int) -> None:
    for number in range(rounds):
        async with workshop(own_server, max_deliveries=1) as shop:
            await in_the_middle(shop, ask=number == 0)
            await asyncio.to_thread(own_server.stop)
            await shop.crash()
        await asyncio.to_thread(own_server.start)
    async with workshop(own_server, max_deliveries=1) as shop:
        (await shop.backend.call(1)).done("all of it")
        await shop.idle()
        assert shop.recorded() == ("done", "all of it")
        assert shop.dead() == []


async def test_an_answer_during_which_everything_is_stopped_again_and_again_is_made_in_the_end(
    own_server: RedisServer,
) -> None:
    await everything_is_stopped_again_and_again(own_server, 3)


@pytest.mark.long
async def test_an_answer_during_which_everything_is_stopped_ten_times_is_made_in_the_end(
    own_server: RedisServer,
) -> None:
    await everything_is_stopped_again_and_again(own_server, 10)


async def test_a_node_that_is_killed_after_it_was_told_to_stop_has_not_died(redis_server: RedisServer) -> None:
    for number in range(2):
        async with workshop(redis_server, max_deliveries=1) as shop:
            await in_the_middle(shop, ask=number == 0)
            await begin_to_stop(shop)
            assert json.loads(shop.redis.get(shop.keys.lease("0")))["stopping"] is True
            assert list(shop.pending().values()) == [0]
            await shop.crash()
    async with workshop(redis_server, max_deliveries=1) as shop:
        call = await shop.backend.call(1)
        assert "stopping" not in json.loads(shop.redis.get(shop.keys.lease("0")))
        call.done("all of it")
        await shop.idle()
        assert shop.recorded() == ("done", "all of it")


async def test_a_request_that_comes_in_while_a_node_stops_does_not_die_with_it(redis_server: RedisServer) -> None:
    async with workshop(redis_server, read_block="500ms") as shop:
        await wait_until(lambda: shop.consumer.reached_redis_within(1) and shop.lease_keeper.held, "it is running")
        await wait_until(
            lambda: any(one["cmd"] == "xreadgroup" and "b" in one["flags"] for one in shop.redis.client_list()),
            "it waits for requests",
        )
        await begin_to_stop(shop)
        await shop.ask()
        await shop.backend.call(1)
        assert list(shop.pending().values()) == [0]
        await shop.crash()


async def test_a_request_that_streams_text_and_then_kills_its_worker_is_buried(redis_server: RedisServer) -> None:
    for number in range(2):
        async with workshop(redis_server, max_deliveries=2) as shop:
            await in_the_middle(shop, ask=number == 0)
            await shop.crash()
    async with workshop(redis_server, max_deliveries=2) as shop:
        await shop.idle()
        assert shop.recorded() == ("failed", "")
        assert [letter["reason"] for letter in shop.dead()] == ["worker_died"]
        assert shop.backend.calls == []


async def test_a_death_counts_also_when_redis_was_restarted_earlier_in_the_life_of_the_node(
    own_server: RedisServer,
) -> None:
    async with workshop(own_server, max_deliveries=1, lease="300ms") as shop:
        await in_the_middle(shop, ask=True)
        await asyncio.to_thread(own_server.stop)
        await asyncio.to_thread(own_server.start)
        renewals = _leases_taken(shop)
        await wait_until(lambda: _leases_taken(shop) > renewals + 1, "the lease is renewed")
        await shop.crash()
    async with workshop(own_server, max_deliveries=1) as shop:
        await shop.idle()
        assert shop.recorded()[0] == "failed"


def _leases_taken(shop: Workshop) -> int:
    """Number of writes to the directory; each renewal makes one."""
    return int(shop.redis.info("commandstats").get("cmdstat_zadd", {"calls": 0})["calls"])


@pytest.mark.long
async def test_what_was_stopped_together_with_redis_is_adopted_as_what_has_not_died(own_server: RedisServer) -> None:
    for number in range(2):
        node = str(number)  # first its own node is stopped, then its adopter
        async with workshop(own_server, node=node, max_deliveries=1, lease=QUICK_LEASE) as shop:
            await in_the_middle(shop, ask=number == 0)
            await asyncio.to_thread(own_server.stop)
            await shop.crash()
        await asyncio.to_thread(own_server.start)
    async with workshop(own_server, node="2", max_deliveries=1, lease=QUICK_LEASE) as shop:
        (await shop.backend.call(1)).done("all of it")
        await shop.idle()
        assert shop.recorded() == ("done", "all of it")


async def test_a_request_that_takes_everything_down_with_it_each_time_comes_to_an_end(
    redis_server: RedisServer,
) -> None:
    async with workshop(redis_server, start=False, max_attempts=1) as shop:
        entry_id = await shop.ask()
        for _ in range(31):
            await shop.replies.open(10001, "m", request=f"0/{entry_id}")
        shop.start()
        await shop.idle()
        assert shop.recorded()[0] == "failed"
        assert [letter["reason"] for letter in shop.dead()] == ["worker_died"]


async def test_a_request_that_was_taken_over_is_not_taken_back_by_whoever_stops(redis_server: RedisServer) -> None:
    backend = PlayedBackend()
    async with workshop(redis_server, backend=backend) as frozen:
        await frozen.ask()
        await backend.call(1)
        stream = frozen.keys.requests("0")
        [entry_id] = frozen.pending()
        frozen.redis.xclaim(stream, "workers", "1", 0, [entry_id], retrycount=2, justid=True)
        await begin_to_stop(frozen)
        await frozen.stop()
        [row] = frozen.redis.xpending_range(stream, "workers", "-", "+", 1)
        assert (row["consumer"], row["times_delivered"]) == ("1", 2)
