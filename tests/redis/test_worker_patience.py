"""A backend that is away: messages wait for it, in the same attempt, as long as the retry window."""

import asyncio
from typing import Any

import pytest

from imstream.clock import now_ms
from imstream.errors import BackendError, FailureKind, StoreUnavailable
from imstream.store.requests import RequestStream
from tests.redis.worker_harness import USER, Call, WorkerHarness, run_worker
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until


def failure(kind: FailureKind = "away", reason: str = "connect_failed") -> BackendError:
    """A failed call."""
    return BackendError(reason, "refused by http://ai/v1", kind=kind)


def waits(worker: WorkerHarness) -> list[dict[str, str]]:
    """The entries `waiting` of the reply."""
    return [entry for entry in worker.entries() if entry["event"] == "waiting"]


@pytest.mark.parametrize("kind", ["away", "misconfigured"])
async def test_waiting_for_a_backend_uses_up_no_attempt_and_is_recorded(
    redis_server: RedisServer, kind: FailureKind
) -> None:
    async with run_worker(redis_server, max_attempts=1, retry_window="1h") as worker:
        client = worker.follow()
        await worker.ask()
        for number in range(1, 6):
            (await worker.backend.call(number)).fail(failure(kind))
        (await worker.backend.call(6)).done("at ", "last")
        assert await client.end() == "done"
        assert (client.text, client.restarts) == ("at last", 0)
        await worker.idle()
        entries = waits(worker)
        assert len(entries) == 5
        assert {(entry["backend"], entry["reason"], entry["error"]) for entry in entries} == {
            ("played", "connect_failed", "refused by http://ai/v1")
        }
        [since] = {int(entry["since"]) for entry in entries}
        assert {int(entry["until"]) - since for entry in entries} == {3_600_000}
        assert worker.attempts() == [1]
        assert worker.dead() == []


async def test_the_random_time_until_the_next_call_grows_up_to_its_limit(redis_server: RedisServer) -> None:
    async with run_worker(
        redis_server, retry_window="1h", ai_breaker_failures=99, retry_wait="4ms", retry_wait_max="40ms"
    ) as worker:
        await worker.ask()
        for number in range(1, 41):
            (await worker.backend.call(number)).fail(failure())
        (await worker.backend.call(41)).done("at last")
        await worker.idle()
        pauses = [int(entry["retry_after"]) for entry in waits(worker)]
        assert pauses[0] <= 4
        assert pauses[1] <= 8
        assert 20 < max(pauses) <= 40


async def test_each_wait_is_recorded_with_the_time_until_the_next_call(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, max_attempts=1, retry_wait="600ms", retry_wait_max="600ms") as worker:
        client = worker.follow()
        begun = now_ms()
        await worker.ask()
        for number in (1, 2):
            (await worker.backend.call(number)).fail(failure())
        last = await worker.backend.call(3)
        called = now_ms()
        last.done("at last")
        assert await client.end() == "done"
        await worker.idle()
        told = [int(entry["retry_after"]) for entry in waits(worker)]
        assert 0 < sum(told) <= called - begun + len(told)  # each is rounded


async def test_a_backend_that_goes_away_while_its_model_thinks_does_not_begin_the_window_again(
    redis_server: RedisServer,
) -> None:
    async with run_worker(redis_server, max_attempts=1, retry_window="1h") as worker:
        client = worker.follow()
        await worker.ask()
        (await worker.backend.call(1)).fail(failure())
        for number in (2, 3):
            call = await worker.backend.call(number)
            assert call.think is not None
            call.think("hm")
            await wait_until(lambda: "thinking" in worker.entries()[-1], "it is recorded that the model thinks")
            call.fail(failure())
        (await worker.backend.call(4)).done("at last")
        assert await client.end() == "done"
        await worker.idle()
        assert [entry["event"] for entry in worker.entries()[1:]] == [
            *("opened", "waiting", "text", "waiting", "text", "waiting", "done")
        ]
        assert len({entry["since"] for entry in worker.entries() if "since" in entry}) == 1
        assert all("since" in entry for entry in worker.entries() if "thinking" in entry)
        assert worker.attempts() == [1]


async def test_at_the_end_of_the_window_the_message_fails_with_the_last_reason(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, retry_window="300ms", retry_wait="50ms") as worker:
        client = worker.follow()
        worker.backend.always = lambda call: call.fail(failure())
        began = asyncio.get_running_loop().time()
        await worker.ask()
        assert await client.end() == "failed"
        assert asyncio.get_running_loop().time() - began >= 0.3
        await worker.idle()
        assert len(worker.backend.calls) > 1
        [letter] = worker.dead()
        assert (letter["reason"], letter["error"]) == ("connect_failed", "refused by http://ai/v1")


@pytest.mark.parametrize("continues", ["none", "assistant"])
async def test_an_outage_after_some_text_has_a_window_of_its_own(redis_server: RedisServer, continues: str) -> None:
    loop = asyncio.get_running_loop()
    async with run_worker(redis_server, retry_window="500ms", ai_continue=continues) as worker:
        client = worker.follow()
        await worker.ask()
        (await worker.backend.call(1)).fail(failure())
        began = loop.time()
        call = await worker.backend.call(2)
        call.send("at ")
        await wait_until(lambda: loop.time() - began > 0.6, "the window of the first outage is over")
        call.fail(failure("broken", "broken_stream"))
        (await worker.backend.call(3)).fail(failure())
        (await worker.backend.call(4)).done("last" if continues == "assistant" else "at last")
        assert await client.end() == "done"
        assert client.text == "at last"
        await worker.idle()


async def test_a_message_whose_record_is_lost_again_and_again_waits_no_longer_than_its_window(
    redis_server: RedisServer,
) -> None:
    def lose_and_fail(call: Call) -> None:
        worker.redis.delete(worker.keys.reply(USER, "m"))
        call.fail(failure())

    async with run_worker(redis_server, retry_window="300ms", retry_wait="50ms") as worker:
        client = worker.follow()
        await worker.ask()
        call = await worker.backend.call(1)
        worker.redis.delete(worker.keys.reply(USER, "m"))
        call.fail(failure())
        await wait_until(lambda: waits(worker), "the wait is recorded in spite of the loss")
        worker.backend.always = lose_and_fail
        for later in worker.backend.calls[1:]:
            lose_and_fail(later)
        assert await client.end() == "failed"
        await worker.idle()
        assert worker.recorded() == ("failed", "")


async def test_the_reply_of_a_message_that_waits_is_kept_until_its_window_ends(redis_server: RedisServer) -> None:
    slow: dict[str, Any] = {"retry_window": "1h", "reply_ttl": "1m", "retry_wait": "1m", "retry_wait_max": "1m"}
    async with run_worker(redis_server, **slow) as worker:
        await worker.ask()
        (await worker.backend.call(1)).fail(failure())
        await wait_until(lambda: waits(worker), "it waits")
        assert worker.redis.pttl(worker.keys.reply(USER, "m")) >= 3_600_000
        await worker.crash()


async def test_a_node_that_stops_without_redis_gives_back_the_call_that_would_have_tried_its_backend(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lost(*_: object, **_more: object) -> None:
        raise StoreUnavailable("no answer in time")

    async with run_worker(
        redis_server, read_block="1s", ai_breaker_failures=1, ai_breaker_pause="10ms", retry_wait_max="10ms"
    ) as worker:
        worker.upstream.record_failure(failure(), user=USER, period=worker.upstream.gate.period)
        await wait_until(worker.upstream.may_be_called, "its breaker is half-open")
        await worker.reads()
        monkeypatch.setattr(RequestStream, "hand_back", lost)
        worker.consumer.stop()
        await worker.ask()
        await wait_until(lambda: worker.pending() and len(worker.jobs) == 0, "the request has come and is left")
        assert worker.backend.calls == []
        assert worker.upstream.in_flight == 0


async def test_a_message_that_waits_behind_an_open_breaker_does_not_outlive_its_window(
    redis_server: RedisServer,
) -> None:
    async with run_worker(
        redis_server, retry_window="300ms", ai_breaker_failures=1, ai_breaker_pause="1h", retry_wait_max="1h"
    ) as worker:
        client = worker.follow()
        worker.backend.always = lambda call: call.fail(failure())
        await worker.ask()
        assert await client.end() == "failed"
        await worker.idle()
        assert len(worker.backend.calls) == 1
        assert [letter["reason"] for letter in worker.dead()] == ["connect_failed"]


async def test_the_next_worker_goes_on_waiting_in_the_same_window(redis_server: RedisServer) -> None:
    async with run_worker(
        redis_server, max_attempts=1, retry_window="1h", retry_wait="1h", retry_wait_max="1h"
    ) as worker:
        await worker.ask()
        (await worker.backend.call(1)).fail(failure())
        await wait_until(lambda: waits(worker), "the wait is recorded")
        [begun] = {entry["since"] for entry in waits(worker)}
        await worker.crash()
    async with run_worker(
        redis_server, max_attempts=1, retry_window="1h", retry_wait="1h", retry_wait_max="1h"
    ) as worker:
        (await worker.backend.call(1)).fail(failure())
        await wait_until(lambda: len(waits(worker)) == 2, "the second wait is recorded")
        assert {entry["since"] for entry in waits(worker)} == {begun}
        assert worker.attempts() == [1, 2]
        await worker.crash()
        await wait_until(lambda: now_ms() - int(begun) > 100, "a window of 100 ms would be over")
    async with run_worker(redis_server, max_attempts=1, retry_window="100ms") as worker:
        worker.backend.always = lambda call: call.fail(failure())
        await worker.idle()
        assert len(worker.backend.calls) == 1
        assert len(worker.dead()) == 1


async def test_attempts_that_only_waited_do_not_count_for_the_next_worker(redis_server: RedisServer) -> None:
    slow: dict[str, Any] = {"max_attempts": 2, "max_deliveries": 9, "retry_wait": "1h", "retry_wait_max": "1h"}
    for _ in range(3):
        async with run_worker(redis_server, **slow) as worker:
            if not worker.entries():
                await worker.ask()
            before = len(waits(worker))
            (await worker.backend.call(1)).fail(failure())
            await wait_until(lambda: len(waits(worker)) > before, "the wait is recorded")  # noqa: B023 - awaited here
            await worker.crash()
    async with run_worker(redis_server, max_attempts=2, max_deliveries=9) as worker:
        (await worker.backend.call(1)).fail(failure("broken", "broken_stream"))
        (await worker.backend.call(2)).done("x")
        await worker.idle()
        assert worker.recorded() == ("done", "x")


async def test_a_backend_that_goes_away_within_its_answer_has_broken_it(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, max_attempts=2) as worker:
        client = worker.follow()
        await worker.ask()
        call = await worker.backend.call(1)
        call.send("some ")
        call.fail(failure())
        (await worker.backend.call(2)).done("text")
        assert await client.end() == "done"
        assert (client.text, client.restarts) == ("text", 1)
        await worker.idle()
        assert waits(worker) == []
        assert worker.attempts() == [1, 2]


async def test_a_message_that_waits_can_be_cancelled(redis_server: RedisServer) -> None:
    async with run_worker(redis_server, retry_wait="1h", retry_wait_max="1h") as worker:
        client = worker.follow()
        await worker.ask()
        (await worker.backend.call(1)).fail(failure())
        await wait_until(lambda: waits(worker), "it waits")
        assert await worker.jobs.cancel(USER, "m") == "cancelled"
        assert await client.end() == "cancelled"
        await worker.idle()


def _answer(call: Call) -> None:
    call.done("x")


async def test_failures_of_one_user_that_others_need_not_share_do_not_hold_up_the_others(
    redis_server: RedisServer,
) -> None:
    async with run_worker(
        redis_server, ai_breaker_failures=3, ai_breaker_pause="1h", retry_wait="10ms", retry_wait_max="20ms"
    ) as worker:
        await worker.ask("hopeless")
        for number in range(1, 8):
            (await worker.backend.call(number)).fail(failure("away", "first_token_timeout"))
        assert not worker.upstream.gate.breaker.tripped
        worker.backend.always = _answer
        await worker.idle()
