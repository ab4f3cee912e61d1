"""Attempts: their number, their distance in time, and what the client sees."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from imstream.errors import BackendError, PermanentBackendError, TransientBackendError
from imstream.keys import GROUP
from imstream.model import Terminal
from tests.redis.workshop import Call, workshop
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until


def overloaded(retry_after: timedelta | None = None) -> TransientBackendError:
    """The error of an overloaded backend."""
    return TransientBackendError("http_503", "overloaded", retry_after=retry_after)


async def test_a_failed_attempt_is_followed_by_another_and_the_client_told(redis_server: RedisServer) -> None:
    async with workshop(redis_server) as shop:
        client = shop.follow()
        await shop.ask()
        first = await shop.backend.call(1)
        first.send("the first words")
        assert client.text == "the first words"
        first.fail(overloaded())
        second = await shop.backend.call(2)
        assert (client.text, client.restarts) == ("", 1)
        second.done("the second ", "words")
        assert await client.end() == "done"
        assert client.text == "the second words"
        await shop.idle()
        assert shop.recorded() == ("done", "the second words")
        assert [entry["attempt"] for entry in shop.entries() if entry["event"] == "opened"] == ["1", "2"]


async def test_after_the_last_attempt_the_request_is_buried_and_the_client_told(redis_server: RedisServer) -> None:
    async with workshop(redis_server, max_attempts=3) as shop:
        client = shop.follow()
        shop.backend.always = lambda call: call.fail(overloaded())
        await shop.ask()
        assert await client.end() == "failed"
        assert client.terminal == Terminal("failed", reason="http_503", error="overloaded")
        await shop.idle()
        assert len(shop.backend.calls) == 3
        [letter] = shop.dead()
        assert (letter["reason"], letter["error"], letter["attempts"]) == ("http_503", "overloaded", "3")
        assert shop.recorded() == ("failed", "")


async def test_attempts_of_a_dead_process_count(redis_server: RedisServer) -> None:
    async with workshop(redis_server, max_attempts=2) as shop:
        await shop.ask()
        await shop.backend.call(1)
        await shop.crash()
    async with workshop(redis_server, max_attempts=2) as shop:
        shop.backend.always = lambda call: call.fail(overloaded())
        await shop.idle()
        assert len(shop.backend.calls) == 1
        assert [letter["attempts"] for letter in shop.dead()] == ["2"]


async def test_what_can_never_succeed_is_not_tried_again(redis_server: RedisServer) -> None:
    async with workshop(redis_server) as shop:
        client = shop.follow()
        await shop.ask()
        call = await shop.backend.call(1)
        call.send("some text")
        call.fail(PermanentBackendError("context_too_long", "at most 8192 tokens"))
        assert await client.end() == "failed"
        await shop.idle()
        assert len(shop.backend.calls) == 1
        assert [letter["reason"] for letter in shop.dead()] == ["context_too_long"]
        assert shop.recorded() == ("failed", "some text")
        assert client.text == "some text"


async def test_a_backend_that_names_a_time_is_left_alone_until_then(redis_server: RedisServer) -> None:
    async with workshop(redis_server) as shop:
        await shop.ask()
        call = await shop.backend.call(1)
        shop.backend.always = _answer
        failed_at = asyncio.get_running_loop().time()
        call.fail(overloaded(timedelta(seconds=0.5)))
        await shop.no_longer_reads()
        await shop.ask("other")  # new requests wait, too
        await shop.idle()
        assert len(shop.backend.calls) == 3
        assert all(call.at - failed_at >= 0.5 for call in shop.backend.calls[1:])


def _answer(call: Call) -> None:
    call.done("x")


async def test_a_time_beyond_the_window_is_not_waited_for(redis_server: RedisServer) -> None:
    async with workshop(redis_server, retry_window="1m") as shop:
        client = shop.follow()
        await shop.ask()
        (await shop.backend.call(1)).fail(overloaded(timedelta(minutes=2)))
        assert await client.end() == "failed"
        await shop.idle()
        assert len(shop.backend.calls) == 1


async def test_while_the_backend_fails_again_and_again_new_work_is_begun_one_at_a_time(
    redis_server: RedisServer,
) -> None:
    # A read is blocked when the breaker opens, and returns one of the four below during the pause.
    async with workshop(
        redis_server, max_attempts=1, ai_breaker_failures=3, ai_breaker_pause="300ms", read_block="1s"
    ) as shop:
        for n in range(3):
            await shop.ask(f"bad {n}")
        await shop.backend.call(3)
        tripped_at = asyncio.get_running_loop().time()
        for call in shop.backend.calls:
            call.fail(overloaded())
        await shop.idle()
        first, *_ = [await shop.ask(f"m{n}") for n in range(4)]
        await wait_until(
            lambda: shop.pending() == {first: 0}, "the first is handed back, and does not count as a death"
        )
        probe = await shop.backend.call(4)
        assert shop.pending() == {first: 1}
        assert probe.at - tripped_at >= 0.3
        assert len(shop.jobs) == 1
        assert shop.consumer.reached_redis_within(1)  # it waits, and is ready
        probe.done("x")
        shop.backend.always = _answer
        await wait_until(lambda: len(shop.backend.calls) == 7, "the others are started")
        await shop.idle()


async def test_what_the_dead_have_left_waits_for_the_end_of_a_pause_too(redis_server: RedisServer) -> None:
    async with workshop(redis_server, concurrency=1, max_attempts=1, ai_breaker_pause="300ms") as shop:
        await shop.ask("bad")
        call = await shop.backend.call(1)
        for n in range(3):
            await shop.ask(f"m{n}")
        shop.redis.xreadgroup(GROUP, "0", {shop.keys.requests("0"): ">"})  # as if Redis' reply had been lost
        tripped_at = asyncio.get_running_loop().time()
        call.fail(overloaded(timedelta(milliseconds=300)))
        probe = await shop.backend.call(2)
        assert probe.at - tripped_at >= 0.3
        assert len(shop.jobs) == 1
        probe.done("x")
        shop.backend.always = _answer
        await shop.idle()
        assert [shop.recorded(f"m{n}")[0] for n in range(3)] == ["done"] * 3


@pytest.mark.parametrize("kind", [TransientBackendError, PermanentBackendError, BackendError])
async def test_a_failure_in_one_request_leaves_the_others_alone(
    redis_server: RedisServer, kind: type[BackendError]
) -> None:
    async with workshop(redis_server, max_attempts=1) as shop:
        for n in range(4):
            await shop.ask(f"m{n}")
        await shop.backend.call(4)
        for n, call in enumerate(list(shop.backend.calls)):
            if n % 2:
                call.fail(kind("reason"))
            else:
                call.done("x")
        await shop.idle()
        assert sorted(shop.recorded(f"m{n}")[0] for n in range(4)) == ["done", "done", "failed", "failed"]
        assert len(shop.dead()) == 2


async def test_a_backend_that_breaks_its_own_time_limit_is_a_defect(redis_server: RedisServer) -> None:
    async with workshop(redis_server) as shop:
        await shop.ask()
        (await shop.backend.call(1)).fail(TimeoutError())  # not one of the errors it may raise
        await shop.idle()
        assert [letter["reason"] for letter in shop.dead()] == ["internal_error"]
