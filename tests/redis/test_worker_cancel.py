"""Cancel: takes effect at once in every state of a message, and returns the result."""

import asyncio
from datetime import timedelta

import pytest

from imstream.errors import BackendError, StoreUnavailable
from imstream.model import Terminal
from imstream.store.replies import CancelRecorded
from imstream.store.scripts import LUA
from tests.redis.conftest import chat_request
from tests.redis.worker_harness import USER, WorkerHarness, run_worker
from tests.support.servers import RedisServer
from tests.support.tcp_proxy import Fate, tcp_proxy
from tests.support.waiting import wait_until

CANCELLED = Terminal("cancelled")


async def test_a_message_that_is_being_answered_is_stopped_at_once(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, flush_interval="1h") as worker:
        client = worker.follow()
        await worker.ask()
        call = await worker.backend.call(1)
        call.send("so far")
        assert await worker.jobs.cancel(USER, "m") == "cancelled"
        assert call.cancelled
        assert await client.end() == "cancelled"
        assert client.text == "so far"
        await worker.idle()
        assert worker.recorded() == ("cancelled", "so far")  # exactly the text of the client
        assert worker.dead() == []
        assert len(worker.backend.calls) == 1


async def test_a_message_that_waits_is_never_begun(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, start=False) as worker:
        client = worker.follow()
        await worker.ask()
        assert await worker.jobs.cancel(USER, "m") == "cancelled"
        assert await client.end() == "cancelled"
        worker.start()
        await worker.idle()
        assert worker.recorded() == ("cancelled", "")
        assert worker.backend.calls == []


async def test_a_message_that_is_being_opened_is_never_asked(redis_server: RedisServer) -> None:
    async with (
        tcp_proxy(redis_server.port) as proxy,
        run_worker(redis_server, url=proxy.url, redis_timeout="3s") as worker,
    ):
        await worker.load_scripts()
        opening = proxy.on_answer_to(LUA["open"].digest.encode(), fate=Fate.DELAY, delay=1.0)
        await worker.requests.admit(chat_request(USER, "m"))
        await wait_until(lambda: opening.sprung, "it is being opened")
        assert await worker.jobs.cancel(USER, "m") == "cancelled"
        await worker.idle()
        assert worker.recorded() == ("cancelled", "")
        assert worker.backend.calls == []


async def test_an_opening_that_redis_runs_after_the_cancel_begins_nothing(redis_server: RedisServer) -> None:
    def scripts_run() -> int:
        return int(worker.redis.info("commandstats")["cmdstat_evalsha"]["calls"])

    async with (
        tcp_proxy(redis_server.port) as proxy,
        run_worker(redis_server, url=proxy.url, redis_timeout="3s") as worker,
    ):
        await worker.load_scripts()
        opening = proxy.hold(LUA["open"].digest.encode())
        await worker.requests.admit(chat_request(USER, "m"))
        await wait_until(lambda: opening.sprung, "its opening is on its way")
        assert await worker.jobs.cancel(USER, "m") == "cancelled"
        await worker.idle()
        assert worker.recorded() == ("cancelled", "")
        before = scripts_run()
        opening.released.set()
        await wait_until(lambda: scripts_run() > before, "Redis has run the opening")
        assert worker.recorded() == ("cancelled", "")
        assert worker.backend.calls == []


async def test_a_message_that_waits_for_its_next_attempt_is_cancelled(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        client = worker.follow()
        await worker.ask()
        call = await worker.backend.call(1)
        call.send("first try")
        call.fail(BackendError("http_503", retry_after=timedelta(seconds=60)))
        await wait_until(lambda: worker.recorded_text() == "first try", "the first attempt is recorded")
        assert await worker.jobs.cancel(USER, "m") == "cancelled"
        assert await client.end() == "cancelled"
        await worker.idle()
        assert worker.recorded() == ("cancelled", "first try")
        assert len(worker.backend.calls) == 1


async def test_a_message_whose_end_is_being_recorded_has_ended(redis_server: RedisServer) -> None:
    async with (
        tcp_proxy(redis_server.port) as proxy,
        run_worker(redis_server, url=proxy.url, redis_timeout="3s", flush_interval="1h") as worker,
    ):
        await worker.load_scripts()
        client = worker.follow()
        await worker.ask()
        call = await worker.backend.call(1)
        ending = proxy.on_answer_to(LUA["end"].digest.encode(), fate=Fate.DELAY, delay=0.3)
        call.done("answer")
        await wait_until(lambda: ending.sprung, "its end is being recorded")
        assert await worker.jobs.cancel(USER, "m") == "too_late"
        assert await client.end() == "done"
        await worker.idle()
        assert worker.recorded() == ("done", "answer")


async def test_a_second_cancel_while_the_request_is_being_removed_is_too_late(redis_server: RedisServer) -> None:
    async with (
        tcp_proxy(redis_server.port) as proxy,
        run_worker(redis_server, url=proxy.url, redis_timeout="3s") as worker,
    ):
        await worker.load_scripts()
        client = worker.follow()
        await worker.ask()
        await worker.backend.call(1)
        removal = proxy.on_answer_to(LUA["finish"].digest.encode(), fate=Fate.DELAY, delay=0.3)
        first = asyncio.create_task(worker.jobs.cancel(USER, "m"))
        assert await client.end() == "cancelled"
        await wait_until(lambda: removal.sprung, "its request is being removed")
        assert await worker.jobs.cancel(USER, "m") == "too_late"
        assert await first == "cancelled"
        await worker.idle()
        assert worker.recorded() == ("cancelled", "")


async def test_an_answer_complete_in_the_same_moment_has_one_end(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        for n in range(20):
            client = worker.follow(f"m{n}")
            await worker.ask(f"m{n}")
            call = await worker.backend.call(n + 1)
            cancelling = asyncio.create_task(worker.jobs.cancel(USER, f"m{n}"))
            for _ in range(n % 5):
                await asyncio.sleep(0)
            if not call.outcome.done():
                call.done("answer")
            receipt = await cancelling
            assert await client.end() == {"cancelled": "cancelled", "too_late": "done"}[receipt]
            await worker.idle()
            assert worker.recorded(f"m{n}") == (await client.end(), client.text)


@pytest.mark.parametrize("end", ["done", "failed", "cancelled"])
async def test_a_message_that_has_ended_stays_as_it_is(redis_server: RedisServer, end: str) -> None:
    async with run_worker(redis_server, max_attempts=1) as worker:
        await worker.ask()
        call = await worker.backend.call(1)
        call.send("text")
        match end:
            case "done":
                call.done()
            case "failed":
                call.fail(BackendError("http_503"))
            case _:
                await worker.jobs.cancel(USER, "m")
        await worker.idle()
        assert await worker.jobs.cancel(USER, "m") == "too_late"
        assert worker.recorded() == (end, "text")


async def test_a_message_nobody_knows_and_that_of_another_user_look_the_same(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        await worker.ask(user=10002)
        call = await worker.backend.call(1)
        assert await worker.jobs.cancel(10001, "m") == "unknown"
        assert await worker.jobs.cancel(10001, "never seen") == "unknown"
        call.done("x")
        await worker.idle()
        assert worker.recorded(user=10002) == ("done", "x")


async def test_a_message_cancelled_elsewhere_stops_here(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        client = worker.follow()
        await worker.ask()
        call = await worker.backend.call(1)
        call.send("recorded ")
        await wait_until(lambda: worker.recorded_text() == "recorded ", "the text is recorded")
        assert isinstance(await worker.replies.cancel(USER, "m"), CancelRecorded)  # by another node
        call.send("and not recorded")
        await wait_until(lambda: call.cancelled, "the AI call is stopped")
        assert await client.end() == "cancelled"
        assert client.text == "recorded "
        await worker.idle()
        assert worker.recorded() == ("cancelled", "recorded ")


async def test_text_that_comes_after_a_message_was_cancelled_elsewhere_is_shown_to_nobody(
    redis_server: RedisServer,
) -> None:
    async with run_worker(redis_server) as worker:
        await worker.ask()
        call = await worker.backend.call(1)
        call.send("kept")
        await wait_until(lambda: worker.recorded_text() == "kept", "the text is recorded")
        await worker.replies.cancel(USER, "m")
        record = await worker.replies.read(USER, "m")
        assert record is not None
        reply = worker.buffers.get(USER, "m")
        reply.load(record)  # a socket resumes before the worker reads the cancel
        call.send(" and more")
        late = worker.follow()
        assert (late.text, late.terminal) == ("kept", CANCELLED)
        await wait_until(lambda: call.cancelled, "the AI call is stopped")
        await worker.idle()
        assert worker.recorded() == ("cancelled", "kept")


async def test_while_redis_is_away_a_cancel_says_so_in_time_and_counts_later(redis_server: RedisServer) -> None:
    async with (
        tcp_proxy(redis_server.port) as proxy,
        run_worker(redis_server, url=proxy.url, redis_timeout="1s") as worker,
    ):
        client = worker.follow()
        await worker.ask()
        call = await worker.backend.call(1)
        proxy.swallow()
        proxy.drop()
        with pytest.raises(StoreUnavailable):
            await asyncio.wait_for(worker.jobs.cancel(USER, "m"), 5)
        assert call.cancelled
        with pytest.raises(StoreUnavailable):
            await asyncio.wait_for(worker.jobs.cancel(USER, "not here"), 5)
        proxy.forward()
        proxy.drop()
        assert await client.end() == "cancelled"
        await worker.idle()


async def test_a_cancel_of_an_answer_that_is_handed_back_is_not_too_late(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        await worker.ask()
        await worker.backend.call(1)
        worker.consumer.stop()
        worker.jobs.drain()
        with pytest.raises(StoreUnavailable):
            await worker.jobs.cancel(USER, "m")
        await worker.stop()
        assert await worker.jobs.cancel(USER, "m") == "cancelled"


async def test_a_message_that_redis_has_lost_can_still_be_cancelled(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        client = worker.follow()
        await worker.ask()
        call = await worker.backend.call(1)
        await _lose_everything(worker)
        assert await worker.jobs.cancel(USER, "m") == "cancelled"
        assert call.cancelled
        assert await client.end() == "cancelled"


async def _lose_everything(worker: WorkerHarness) -> None:
    worker.redis.flushall()
    await wait_until(lambda: worker.redis.exists(worker.keys.requests("0")), "the stream is created again")
