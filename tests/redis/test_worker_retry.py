"""Attempts: their number, their distance in time, and the frames of the client."""

import asyncio
from datetime import timedelta

import pytest

from imstream.errors import BackendError, FailureKind
from imstream.keys import GROUP
from imstream.model import Terminal
from tests.redis.worker_harness import Call, run_worker
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until


def overloaded(retry_after: timedelta | None = None) -> BackendError:
    """The error of an overloaded backend, which is away."""
    return BackendError("http_503", "overloaded", kind="away", retry_after=retry_after)


def broken() -> BackendError:
    """The error of an answer that broke."""
    return BackendError("broken_stream", "the connection was lost within the answer")


async def test_a_failed_attempt_is_followed_by_another_and_the_client_told(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        client = worker.follow()
        await worker.ask()
        first = await worker.backend.call(1)
        first.send("the first words")
        assert client.text == "the first words"
        first.fail(overloaded())
        second = await worker.backend.call(2)
        assert (client.text, client.restarts) == ("", 1)
        second.done("the second ", "words")
        assert await client.end() == "done"
        assert client.text == "the second words"
        await worker.idle()
        assert worker.recorded() == ("done", "the second words")
        assert worker.attempts() == [1, 2]


async def test_after_the_last_attempt_the_request_is_buried_and_the_client_told(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, max_attempts=3) as worker:
        client = worker.follow()
        worker.backend.always = lambda call: call.fail(broken())
        await worker.ask()
        assert await client.end() == "failed"
        assert client.terminal == Terminal("failed", reason="broken_stream", error=broken().detail)
        await worker.idle()
        assert len(worker.backend.calls) == 3
        [letter] = worker.dead()
        assert (letter["reason"], letter["error"], letter["attempts"]) == ("broken_stream", broken().detail, "3")
        assert worker.recorded() == ("failed", "")


async def test_attempts_of_a_dead_process_count(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, max_attempts=2) as worker:
        await worker.ask()
        await worker.backend.call(1)
        await worker.crash()
    async with run_worker(redis_server, max_attempts=2) as worker:
        worker.backend.always = lambda call: call.fail(broken())
        await worker.idle()
        assert len(worker.backend.calls) == 1
        assert [letter["attempts"] for letter in worker.dead()] == ["2"]


async def test_what_can_never_succeed_is_not_tried_again(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        client = worker.follow()
        await worker.ask()
        call = await worker.backend.call(1)
        call.send("some text")
        call.fail(BackendError("context_too_long", "at most 8192 tokens", kind="impossible"))
        assert await client.end() == "failed"
        await worker.idle()
        assert len(worker.backend.calls) == 1
        assert [letter["reason"] for letter in worker.dead()] == ["context_too_long"]
        assert worker.recorded() == ("failed", "some text")
        assert client.text == "some text"


async def test_a_backend_that_names_a_time_is_left_alone_until_then(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        await worker.ask()
        call = await worker.backend.call(1)
        worker.backend.always = _answer
        failed_at = asyncio.get_running_loop().time()
        call.fail(overloaded(timedelta(seconds=0.5)))
        await worker.no_longer_reads()
        await worker.ask("other")  # new requests wait, too
        await worker.idle()
        assert len(worker.backend.calls) == 3
        assert all(call.at - failed_at >= 0.5 for call in worker.backend.calls[1:])


def _answer(call: Call) -> None:
    call.done("x")


async def test_a_time_beyond_the_window_is_not_waited_for(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, retry_window="300ms") as worker:
        client = worker.follow()
        await worker.ask()
        (await worker.backend.call(1)).fail(overloaded(timedelta(minutes=2)))
        assert await client.end() == "failed"
        await worker.idle()
        assert len(worker.backend.calls) == 1


async def test_while_the_backend_fails_again_and_again_new_work_is_begun_one_at_a_time(
    redis_server: RedisServer,
) -> None:
    # A read is blocked when the breaker opens, and returns one of the four below during the pause.
    async with run_worker(
        redis_server, retry_window="100ms", ai_breaker_failures=3, ai_breaker_pause="4s", read_block="5s"
    ) as worker:
        for n in range(3):
            await worker.ask(f"bad-{n}")
        await worker.backend.call(3)
        await worker.reads()
        tripped_at = asyncio.get_running_loop().time()
        for call in worker.backend.calls:
            call.fail(overloaded())
        await worker.idle()
        first, *_ = [await worker.ask(f"m{n}") for n in range(4)]
        await wait_until(
            lambda: worker.pending() == {first: 0}, "the first is handed back, and does not count as a death"
        )
        probe = await worker.backend.call(4)
        assert worker.pending() == {first: 1}
        assert probe.at - tripped_at >= 4
        assert len(worker.jobs) == 1
        assert worker.consumer.reached_redis_within(1)  # it waits, and is ready
        probe.done("x")
        worker.backend.always = _answer
        await wait_until(lambda: len(worker.backend.calls) == 7, "the others are started")
        await worker.idle()


async def test_what_the_dead_have_left_waits_for_the_end_of_a_pause_too(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, concurrency=1, retry_window="100ms", ai_breaker_pause="300ms") as worker:
        await worker.ask("bad")
        call = await worker.backend.call(1)
        for n in range(3):
            await worker.ask(f"m{n}")
        worker.redis.xreadgroup(GROUP, "0", {worker.keys.requests("0"): ">"})  # as if Redis' reply had been lost
        tripped_at = asyncio.get_running_loop().time()
        call.fail(overloaded(timedelta(milliseconds=300)))
        probe = await worker.backend.call(2)
        assert probe.at - tripped_at >= 0.3
        assert len(worker.jobs) == 1
        probe.done("x")
        worker.backend.always = _answer
        await worker.idle()
        assert [worker.recorded(f"m{n}")[0] for n in range(3)] == ["done"] * 3


@pytest.mark.parametrize("kind", ["broken", "impossible"])
async def test_a_failure_in_one_request_leaves_the_others_alone(redis_server: RedisServer, kind: FailureKind) -> None:
    async with run_worker(redis_server, max_attempts=1) as worker:
        for n in range(4):
            await worker.ask(f"m{n}")
        await worker.backend.call(4)
        for n, call in enumerate(list(worker.backend.calls)):
            if n % 2:
                call.fail(BackendError("reason", kind=kind))
            else:
                call.done("x")
        await worker.idle()
        assert sorted(worker.recorded(f"m{n}")[0] for n in range(4)) == ["done", "done", "failed", "failed"]
        assert len(worker.dead()) == 2


async def test_a_backend_that_breaks_its_own_time_limit_is_a_defect(redis_server: RedisServer) -> None:
    async with run_worker(redis_server) as worker:
        await worker.ask()
        (await worker.backend.call(1)).fail(TimeoutError())  # not one of the errors it may raise
        await worker.idle()
        assert [letter["reason"] for letter in worker.dead()] == ["internal_error"]
