"""A worker that an operator has paused: it starts nothing, and requests that wait for a backend do not fail."""

import asyncio

import pytest

from imstream.errors import BackendError, StoreRefused
from imstream.store.pauses import ALL, Pause
from tests.redis.worker_harness import USER, WorkerHarness, run_worker
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until


def away() -> BackendError:
    return BackendError("connect_failed", "refused by http://ai/v1", kind="away")


async def pause(worker: WorkerHarness, node: str = ALL) -> None:
    """Pause it as an operator, and wait until it knows."""
    await worker.pauses.pause(node, reason="new weights", by="ann", refuses=False)
    await wait_until(lambda: worker.jobs.line.reason == "paused", "the worker is paused")


async def test_a_running_call_goes_on_and_what_is_asked_meanwhile_waits(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        first, second = worker.follow("1st"), worker.follow("2nd")
        await worker.ask("1st")
        call = await worker.backend.call(1)
        await pause(worker, "0")
        await worker.ask("2nd")
        call.done("finished")
        assert await first.end() == "done"
        await wait_until(lambda: worker.redis.xlen(worker.requests.key) == 1, "the first is removed")
        await asyncio.sleep(5 * worker.settings.read_block.total_seconds())  # several rounds of the consumer
        assert len(worker.backend.calls) == 1
        assert await worker.pauses.resume("0")
        (await worker.backend.call(2)).done("now")
        assert await second.end() == "done"
        await worker.idle()


async def test_a_message_that_waits_for_its_backend_does_not_fail_during_a_pause(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, retry_wait="1h", retry_wait_max="1h", retry_window="1h") as worker:
        client = worker.follow()
        await worker.ask()
        worker.backend.always = lambda call: call.fail(away())
        await wait_until(lambda: worker.entries()[-1]["event"] == "waiting", "it is recorded that it waits")
        await pause(worker)
        await wait_until(lambda: len(worker.jobs) == 0, "the request is handed back")
        made = len(worker.backend.calls)
        await asyncio.sleep(5 * worker.settings.read_block.total_seconds())  # several rounds of the consumer
        # Without a job, no retry window can end.
        assert (len(worker.jobs), len(worker.backend.calls), len(worker.pending())) == (0, made, 1)
        worker.backend.always = lambda call: call.done("at last")
        await worker.pauses.resume(ALL)
        assert await client.end() == "done"
        assert client.text == "at last"
        await worker.idle()
        assert worker.dead() == []
        assert [entry["attempt"] for entry in worker.entries()][-1] == "2"


async def test_a_call_that_breaks_during_a_pause_is_made_again_after_it(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        client = worker.follow()
        await worker.ask()
        call = await worker.backend.call(1)
        call.send("half of")
        await pause(worker)
        call.fail(BackendError("broken_stream", "cut"))
        await wait_until(lambda: len(worker.jobs) == 0, "the request is handed back")
        assert len(worker.backend.calls) == 1
        await worker.pauses.resume(ALL)
        (await worker.backend.call(2)).done("the whole")
        assert await client.end() == "done"
        assert (client.text, client.restarts) == ("the whole", 1)
        await worker.idle()


async def test_the_reply_of_a_request_that_is_handed_back_outlasts_the_pause(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, reply_ttl="1m", queued_ttl="1h") as worker:
        await worker.ask()
        call = await worker.backend.call(1)
        call.send("half of")
        await pause(worker)
        call.fail(BackendError("broken_stream", "cut"))
        await wait_until(lambda: len(worker.jobs) == 0, "the request is handed back")
        kept = worker.redis.pttl(worker.keys.reply(USER, "m"))
        assert kept > 60_000, "clients can resume it, and no number of an attempt is given twice"
        await worker.pauses.resume(ALL)
        (await worker.backend.call(2)).done("the whole")
        await worker.idle()
        assert worker.recorded() == ("done", "the whole")
        assert worker.redis.pttl(worker.keys.reply(USER, "m")) <= 60_000


async def test_a_worker_that_starts_during_a_pause_starts_nothing(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        await worker.stop()
        worker.redis.hset(worker.keys.paused(), ALL, "by hand: no JSON")
        await worker.ask()
    async with run_worker(redis_server) as again:
        await wait_until(lambda: again.jobs.line.reason == "paused", "it knows the pause")
        assert again.pauses.of("any") == Pause("by hand: no JSON")
        assert again.backend.calls == []
        again.redis.delete(again.keys.paused())
        (await again.backend.call(1)).done("now")
        await again.idle()


async def test_a_key_of_another_type_pauses_nothing_and_ends_no_pause(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, start=False) as worker:
        worker.redis.set(worker.keys.paused(), "text")
        assert worker.pauses.of("0") is not None  # not known yet
        with pytest.raises(StoreRefused):
            await worker.pauses.read()
        assert worker.pauses.of("0") is None
        worker.redis.delete(worker.keys.paused())
        worker.redis.hset(worker.keys.paused(), "0", '{"reason": 7, "at": "x", "refuses": 1, "more": true}')
        assert (await worker.pauses.read()) == {"0": Pause()}
        assert Pause().about == "no reason given"
        worker.redis.set(worker.keys.paused(), "text")
        with pytest.raises(StoreRefused):
            await worker.pauses.read()
        assert (worker.pauses.of("0"), worker.pauses.of("1")) == (Pause(), Pause())  # this node reads both
        worker.redis.delete(worker.keys.paused())
