"""Each series of a node changes with the measured value, and a scrape needs neither Redis nor the sockets."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from imstream.keys import Keys
from tests.journeys.test_secrets import allow
from tests.support.backend_scripts import breaks_off, continues
from tests.support.noon import NOON
from tests.support.one_node import OneNode, standing_node
from tests.support.peer import Peer
from tests.support.processes import free_port
from tests.support.raw_socket import raw_user
from tests.support.scraping import metrics_become, scraped
from tests.support.scripted_backend import (
    Exchange,
    Script,
    ScriptedBackend,
    chunk,
    event,
    hangs,
    refuses,
    scripted_backend,
    streams,
)
from tests.support.users import user_id
from tests.support.waiting import wait_until

QUEUE, SLOTS, QUOTA, CHATS = 6, 2, 2, 3
BAD = "badword"


@pytest.fixture(scope="module")
def backend_port() -> int:
    """The port of the backend of each test."""
    return free_port()


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, backend_port: int) -> Iterator[OneNode]:
    """A node with small limits."""
    folder = tmp_path_factory.mktemp("metrics")
    (folder / "words").write_text(BAD, "utf-8")
    settings: dict[str, Any] = {
        "queue_limit": QUEUE,
        "concurrency": SLOTS,
        "user_limit": 2,
        "chats_per_minute": CHATS,
        "daily_quota": QUOTA,
        "quota_timezone": NOON,
        "lease": "1s",
        "words": folder / "words",
        "ai_continue": "assistant",
        "ai_breaker_failures": 2,
        "ai_breaker_pause": "100ms",
        "retry_wait_max": "200ms",
    }
    with standing_node(folder, f"http://127.0.0.1:{backend_port}/v1", **settings) as node:
        yield node


@pytest.fixture
async def backend(backend_port: int) -> AsyncIterator[ScriptedBackend]:
    async with scripted_backend(port=backend_port) as made:
        yield made


def holds(released: asyncio.Event, then: Script | None = None) -> Script:
    """A script: another one once the event is set, by default an answer."""

    async def script(exchange: Exchange) -> None:
        await released.wait()
        await (then or streams("Hello"))(exchange)

    return script


def calls(result: str) -> str:
    return f'imstream_ai_calls_total{{backend="default",result="{result}"}}'


def retries(reason: str) -> str:
    return f'imstream_ai_retries_total{{backend="default",reason="{reason}"}}'


def admissions(result: str) -> str:
    return f'imstream_admissions_total{{result="{result}"}}'


def closes(code: object) -> str:
    return f'imstream_session_closes_total{{code="{code}"}}'


UNFINISHED = 'imstream_requests_unfinished{stream="0"}'
RUNNING = 'imstream_requests_running{stream="0"}'
OLDEST = 'imstream_oldest_request_age_seconds{stream="0"}'
BREAKER = 'imstream_ai_breaker_open{backend="default"}'


async def test_an_answer_is_counted_with_its_times_and_tokens(node: OneNode, backend: ScriptedBackend) -> None:
    user, before = user_id(10001), await scraped(node.now.http)
    usage = {"prompt_tokens": 7, "completion_tokens": 5, "reasoning_tokens": 2, "cached_tokens": 3}
    backend.then(streams("Hel", "lo", usage=usage))
    async with node.peer(user) as someone:
        await someone.chat(user, "a question", "m1")
        await someone.end_of("m1")
        tokens = {f'imstream_ai_tokens_total{{backend="default",kind="{name[:-7]}"}}': n for name, n in usage.items()}
        histograms = ("queue_wait", "first_delta", "answer")
        counts = {f"imstream_{name}_seconds_count": 1.0 for name in histograms}
        answered = {admissions("accepted"): 1.0, 'imstream_messages_total{outcome="done"}': 1.0, calls("done"): 1.0}
        await metrics_become(node.now.http, {**tokens, **counts, **answered, "imstream_sessions": 1.0}, since=before)
    now = await scraped(node.now.http)
    assert (now["imstream_redis_up"], now["imstream_lease_held"], now[BREAKER]) == (1.0, 1.0, 0.0)
    await metrics_become(node.now.http, {UNFINISHED: 0, RUNNING: 0, OLDEST: 0})
    assert now["imstream_redis_roundtrip_seconds_count"] > 0
    assert now["process_open_fds"] > 0
    [build] = [series for series in now if series.startswith("imstream_build_info")]
    assert 'redis_py="8.' in build
    assert not any(series.endswith("_created") for series in now)

    async def lag_is_measured() -> bool:
        return (await scraped(node.now.http))["imstream_loop_lag_seconds_count"] > 0

    await wait_until(lag_is_measured, "the lag of the loop is measured")


async def test_unfinished_requests_are_those_of_the_stream(node: OneNode, backend: ScriptedBackend) -> None:
    released = asyncio.Event()
    backend.then(*[holds(released)] * QUEUE)
    before = await scraped(node.now.http)
    async with AsyncExitStack() as stack:
        users = [user_id(10100 + n) for n in range(QUEUE + 3)]
        peers = [await stack.enter_async_context(node.peer(user)) for user in users]
        told = await asyncio.gather(*(one.chat(user, "?", "m") for one, user in zip(peers, users, strict=True)))
        assert sum(frame["code"] == "BUSY" for frame in told) == 3
        await metrics_become(node.now.http, {UNFINISHED: QUEUE, RUNNING: SLOTS})
        assert node.unfinished() == QUEUE
        assert (await scraped(node.now.http))[OLDEST] > 0
        # Requests that others add and remove are seen at the next renewal of the lease.
        entry = node.redis.xadd(Keys().requests("0"), {"user": "x"})
        await metrics_become(node.now.http, {UNFINISHED: QUEUE + 1})
        node.redis.xdel(Keys().requests("0"), str(entry))
        released.set()
        for one, frame in zip(peers, told, strict=True):
            if frame["code"] == "SUCCESS":
                await one.end_of("m")
    await metrics_become(node.now.http, {UNFINISHED: 0, RUNNING: 0, OLDEST: 0, "imstream_sessions": 0})
    counted = {admissions("accepted"): QUEUE, admissions("busy"): 3, 'imstream_messages_total{outcome="done"}': QUEUE}
    await metrics_become(node.now.http, counted, since=before)


async def cancelled(someone: Peer, message_id: str) -> None:
    await someone.send_frame("CANCEL", messageId=message_id)
    await someone.end_of(message_id)


async def test_each_end_of_a_chat_has_its_result(node: OneNode, backend: ScriptedBackend) -> None:
    user, other, before = user_id(10201), user_id(10202), await scraped(node.now.http)
    backend.then(*[hangs()] * 2)
    async with node.peer(user) as someone, node.peer(other) as another:
        for number in range(QUOTA):
            assert (await someone.chat(user, "?", f"m{number}"))["event"] == "accepted"
        await wait_until(lambda: len(backend.requests) == QUOTA, "the backend is asked")
        assert (await someone.chat(user, "?", "m-quota"))["code"] == "RATE_LIMITED"
        assert (await someone.chat(user, "?", "m-rate"))["code"] == "RATE_LIMITED"
        system = [{"role": "system", "content": "?"}]
        assert (await another.chat(other, "?", "m-system", history=system))["code"] == "FORBIDDEN"
        assert (await another.chat(user, "?", "m-other"))["code"] == "FORBIDDEN"
        allow(node.redis, "-xadd")
        try:
            assert (await another.chat(other, "?", "m-redis"))["code"] == "UNAVAILABLE"
        finally:
            allow(node.redis, "+xadd")
        for number in range(QUOTA):
            await cancelled(someone, f"m{number}")
        results = {"accepted": 2, "quota": 1, "rate_limited": 1, "refused": 2, "unavailable": 1}
        stopped = {'imstream_messages_total{outcome="cancelled"}': 2, calls("stopped"): 2}
        counted = {**{admissions(result): n for result, n in results.items()}, **stopped}
        await metrics_become(node.now.http, counted, since=before)


async def test_refusals_by_the_cap_of_a_user_are_counted_apart(node: OneNode, backend: ScriptedBackend) -> None:
    user, before, limit = user_id(10301), await scraped(node.now.http), 2
    node.redis.hset(Keys().load("0"), str(user), str(limit))
    async with node.peer(user) as someone:
        assert (await someone.chat(user, "?", "m1"))["code"] == "BUSY"
    node.redis.hdel(Keys().load("0"), str(user))
    assert backend.requests == []
    await metrics_become(node.now.http, {admissions("user_busy"): 1}, since=before)


async def test_failed_calls_are_counted_by_whose_fault_they_are(node: OneNode, backend: ScriptedBackend) -> None:
    user, before, released = user_id(10401), await scraped(node.now.http), asyncio.Event()
    breaks = holds(released, breaks_off(event(chunk("Hel"))))
    backend.then(*[refuses(503)] * 2, breaks, continues("Hel", "lo"), refuses(400))
    async with node.peer(user) as someone:
        await someone.chat(user, "?", "m1")
        await metrics_become(node.now.http, {BREAKER: 1})
        released.set()
        await someone.end_of("m1")
        await metrics_become(node.now.http, {BREAKER: 0})
        await someone.chat(user, "?", "m2")
        await someone.end_of("m2")
    counted = {
        calls("away"): 2,
        calls("broken"): 1,
        calls("done"): 1,
        calls("impossible"): 1,
        retries("http_503"): 2,
        retries("broken_stream"): 1,
        retries("http_400"): 0,
        'imstream_continuations_total{backend="default"}': 1,
        'imstream_dead_letters_total{reason="http_400"}': 1,
        'imstream_messages_total{outcome="failed"}': 1,
        UNFINISHED: 0,
    }
    await metrics_become(node.now.http, counted, since=before)


async def test_an_answer_that_a_guard_rejects_is_one(node: OneNode, backend: ScriptedBackend) -> None:
    user, before = user_id(10501), await scraped(node.now.http)
    backend.then(streams(f"a {BAD} "))
    async with node.peer(user) as someone:
        await someone.chat(user, "?", "m1")
        await someone.end_of("m1")
    counted = {calls("refused"): 1, 'imstream_messages_total{outcome="failed"}': 1}
    await metrics_become(node.now.http, counted, since=before)


async def test_sockets_are_counted_by_their_close_code(node: OneNode) -> None:
    user, before = user_id(10601), await scraped(node.now.http)
    async with node.peer(user) as someone:
        await someone.connection.close(3999)
    async with node.peer(user) as someone:
        await someone.connection.close(1000)
    async with raw_user(node.port, user):
        pass
    async with node.peer(user) as someone:
        await someone.send_frame("INIT", userId="no id of any kind\n")
        assert await someone.closed() == 4501
    counted = {closes("other"): 1, closes(1000): 1, closes(1005): 1, closes(4501): 1}
    await metrics_become(node.now.http, counted, since=before)


async def test_a_reader_that_stops_reading_is_counted_once(node: OneNode, backend: ScriptedBackend) -> None:
    user, before = user_id(10701), await scraped(node.now.http)
    backend.then(streams(*["a" * 16_000] * 16))
    async with raw_user(node.port, user, narrow=True) as someone:
        await someone.send_frame(msgType="CHAT", userId=user, contents="everything", messageId="m1")
        await metrics_become(node.now.http, {"imstream_slow_readers_total": 1}, since=before)
        # Sockets are checked each second: it would be counted a second time by now.
        await wait_until(lambda: node.unfinished() == 0, "its answer is complete")
        await asyncio.sleep(1.2)  # the time in which it must not be counted
    await metrics_become(node.now.http, {"imstream_slow_readers_total": 1}, since=before)


async def test_no_series_names_a_user_or_a_message(node: OneNode) -> None:
    series = "\n".join(await scraped(node.now.http))
    assert not any(number in series for number in ("10001", "10201", "m-quota"))
