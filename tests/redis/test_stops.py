"""Deliveries do not count as deaths when the worker was stopped, or when Redis stopped together with it."""

import asyncio
import json

import pytest

from tests.redis.worker_harness import PlayedBackend, WorkerHarness, run_worker
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until

ON_SERVERS = ["valkey"]

QUICK_LEASE = "300ms"
TEXT = "some of it"


async def in_the_middle(worker: WorkerHarness, *, ask: bool) -> None:
    """Wait until some text of an answer is recorded."""
    if ask:
        await worker.ask()
    call = await worker.backend.call(1)
    call.send(TEXT)
    await wait_until(lambda: worker.recorded_text() == TEXT, "some text is recorded")


async def begin_to_stop(worker: WorkerHarness) -> None:
    """The first step of a node on SIGTERM."""
    worker.consumer.stop()
    worker.adopter.stop()
    await asyncio.gather(worker.lease_keeper.mark_stopping(), worker.jobs.uncount_deliveries())


async def everything_is_stopped_again_and_again(own_server: RedisServer, rounds: int) -> None:
    for number in range(rounds):
        async with run_worker(own_server, max_deliveries=1) as worker:
            await in_the_middle(worker, ask=number == 0)
            await asyncio.to_thread(own_server.stop)
            await worker.crash()
        await asyncio.to_thread(own_server.start)
    async with run_worker(own_server, max_deliveries=1) as worker:
        (await worker.backend.call(1)).done("all of it")
        await worker.idle()
        assert worker.recorded() == ("done", "all of it")
        assert worker.dead() == []


async def test_an_answer_during_which_everything_is_stopped_again_and_again_is_made_in_the_end(
    own_server: RedisServer,
) -> None:
    await everything_is_stopped_again_and_again(own_server, 3)


@pytest.mark.long
async def test_an_answer_during_which_everything_is_stopped_ten_times_is_made_in_the_end(
    own_server: RedisServer,
) -> None:
    await everything_is_stopped_again_and_again(own_server, 10)


async def test_a_kill_after_the_signal_to_stop_does_not_count_as_a_death(redis_server: RedisServer) -> None:
    for number in range(2):
        async with run_worker(redis_server, max_deliveries=1) as worker:
            await in_the_middle(worker, ask=number == 0)
            await begin_to_stop(worker)
            assert json.loads(worker.redis.get(worker.keys.lease("0")))["stopping"] is True
            assert list(worker.pending().values()) == [0]
            await worker.crash()
    async with run_worker(redis_server, max_deliveries=1) as worker:
        call = await worker.backend.call(1)
        assert "stopping" not in json.loads(worker.redis.get(worker.keys.lease("0")))
        call.done("all of it")
        await worker.idle()
        assert worker.recorded() == ("done", "all of it")


async def test_a_request_that_comes_in_while_a_node_stops_does_not_die_with_it(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, read_block="500ms") as worker:
        await wait_until(lambda: worker.consumer.reached_redis_within(1) and worker.lease_keeper.held, "it is running")
        await worker.reads()
        await begin_to_stop(worker)
        await worker.ask()
        await worker.backend.call(1)
        assert list(worker.pending().values()) == [0]
        await worker.crash()


async def test_a_request_that_streams_text_and_then_kills_its_worker_is_buried(redis_server: RedisServer) -> None:
    for number in range(2):
        async with run_worker(redis_server, max_deliveries=2) as worker:
            await in_the_middle(worker, ask=number == 0)
            await worker.crash()
    async with run_worker(redis_server, max_deliveries=2) as worker:
        await worker.idle()
        assert worker.recorded() == ("failed", "")
        assert [letter["reason"] for letter in worker.dead()] == ["worker_died"]
        assert worker.backend.calls == []


async def test_a_death_counts_also_when_redis_was_restarted_earlier_in_the_life_of_the_node(
    own_server: RedisServer,
) -> None:
    async with run_worker(own_server, max_deliveries=1, lease="300ms") as worker:
        await in_the_middle(worker, ask=True)
        await asyncio.to_thread(own_server.stop)
        await asyncio.to_thread(own_server.start)
        renewals = _leases_taken(worker)
        await wait_until(lambda: _leases_taken(worker) > renewals + 1, "the lease is renewed")
        await worker.crash()
    async with run_worker(own_server, max_deliveries=1) as worker:
        await worker.idle()
        assert worker.recorded()[0] == "failed"


def _leases_taken(worker: WorkerHarness) -> int:
    """Number of writes to the directory; each renewal makes one."""
    return int(worker.redis.info("commandstats").get("cmdstat_zadd", {"calls": 0})["calls"])


@pytest.mark.long
async def test_a_stop_together_with_redis_does_not_count_as_a_death_for_the_adopter(own_server: RedisServer) -> None:
    for number in range(2):
        node = str(number)  # first its own node is stopped, then its adopter
        async with run_worker(own_server, node=node, max_deliveries=1, lease=QUICK_LEASE) as worker:
            await in_the_middle(worker, ask=number == 0)
            await asyncio.to_thread(own_server.stop)
            await worker.crash()
        await asyncio.to_thread(own_server.start)
    async with run_worker(own_server, node="2", max_deliveries=1, lease=QUICK_LEASE) as worker:
        (await worker.backend.call(1)).done("all of it")
        await worker.idle()
        assert worker.recorded() == ("done", "all of it")


async def test_a_request_that_takes_everything_down_with_it_each_time_comes_to_an_end(
    redis_server: RedisServer,
) -> None:
    async with run_worker(redis_server, start=False, max_attempts=1) as worker:
        entry_id = await worker.ask()
        for _ in range(31):
            await worker.replies.open(10001, "m", request=f"0/{entry_id}")
        worker.start()
        await worker.idle()
        assert worker.recorded()[0] == "failed"
        assert [letter["reason"] for letter in worker.dead()] == ["worker_died"]


async def test_a_request_that_was_taken_over_is_not_taken_back_by_a_worker_that_stops(
    redis_server: RedisServer,
) -> None:
    backend = PlayedBackend()
    async with run_worker(redis_server, backend=backend) as frozen:
        await frozen.ask()
        await backend.call(1)
        stream = frozen.keys.requests("0")
        [entry_id] = frozen.pending()
        frozen.redis.xclaim(stream, "workers", "1", 0, [entry_id], retrycount=2, justid=True)
        await begin_to_stop(frozen)
        await frozen.stop()
        [row] = frozen.redis.xpending_range(stream, "workers", "-", "+", 1)
        assert (row["consumer"], row["times_delivered"]) == ("1", 2)
