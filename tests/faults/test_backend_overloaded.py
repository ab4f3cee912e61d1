"""An overloaded backend: nodes respect Retry-After, nothing accumulates, and all requests are answered."""

import asyncio
import time
from pathlib import Path
from typing import Any

from imstream.texts import Text
from tests.support.backend_scripts import question_of
from tests.support.one_node import one_node
from tests.support.scripted_backend import Exchange, refuses, scripted_backend, streams
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until

USER = 10001

BUSY = '{"error": {"message": "slow down", "code": "rate_limit_exceeded"}}'


async def test_retry_after_is_honoured_by_the_request_and_by_those_behind_it(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with (
        scripted_backend(always=streams("At ", "last")) as backend,
        one_node(tmp_path, redis_server, backend.url, concurrency=2) as node,
    ):
        backend.then(refuses(429, BUSY, headers={"Retry-After": "2"}))
        async with node.peer(USER) as someone:
            await someone.chat(USER, "first", "m0")
            refused = await backend.request(0)
            await wait_until(lambda: "message waits" in node.now.process.output(), "the refusal has arrived")
            for number in range(1, 6):
                await someone.chat(USER, f"behind it {number}", f"m{number}")
            for number in range(6):
                assert (await someone.end_of(f"m{number}")).text == "At last"
        early = [request for request in backend.requests[1:] if request.received_at - refused.received_at < 1.95]
        # One more call is possible, by a read that was blocked when the refusal came.
        assert len(early) <= 1
        assert all(question_of(request) != "first" for request in early)
        assert len(backend.requests) == 7
        await node.settled()


async def test_a_storm_of_errors_slows_the_intake_bounds_the_queue_and_passes(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    cap, threshold, pause = 20, 5, 0.3
    storm = True

    async def weather(exchange: Exchange) -> None:
        if storm:
            await refuses(503, "<html>overloaded</html>", content_type="text/html")(exchange)
        else:
            await streams("Fine")(exchange)

    settings: dict[str, Any] = {
        "queue_limit": cap,
        "concurrency": 8,
        "ai_breaker_failures": threshold,
        "ai_breaker_pause": f"{pause}s",
        "retry_wait": "10ms",
        "retry_wait_max": "600ms",
    }
    async with (
        scripted_backend(always=weather) as backend,
        one_node(tmp_path, redis_server, backend.url, **settings) as node,
    ):
        async with node.peer(USER) as someone:
            verdicts = [await someone.chat(USER, f"question {n}", f"m{n}") for n in range(2 * cap)]
            accepted = [frame["messageId"] for frame in verdicts if frame.get("event") == "accepted"]
            busy = [frame for frame in verdicts if frame["code"] == "BUSY"]
            assert len(accepted) == cap
            assert len(busy) == cap
            assert {frame["contents"] for frame in busy} == {Text.BUSY.zh}

            await wait_until(lambda: len(backend.requests) >= threshold, "the breaker has counted failures")
            before, began = len(backend.requests), time.monotonic()
            await asyncio.sleep(2.0)  # the time in which calls are counted
            calls, seconds = len(backend.requests) - before, time.monotonic() - began
            # 8 jobs that wait 10 to 600 ms would call some 40 times; the breaker allows 8 calls after each pause.
            assert 1 <= calls <= 8 * (seconds / pause)
            assert node.unfinished() == cap
            assert len(node.pending()) <= 8  # the others wait in the stream, not in memory

            storm = False
            for message_id in accepted:
                assert (await someone.end_of(message_id)).text == "Fine"
            assert (await someone.chat(USER, "after the storm", "after"))["event"] == "accepted"
            assert (await someone.end_of("after")).text == "Fine"
        assert node.dead() == []
        await node.settled()
