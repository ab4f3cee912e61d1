"""Stalled readers: each costs at most its own text, is closed in time, and delays no other client."""

import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from imstream.texts import Text
from tests.support.backend_scripts import question_of
from tests.support.one_node import one_node
from tests.support.peer import TERMINAL, Peer
from tests.support.raw_socket import PING, RawSocket, frame, raw_user
from tests.support.scripted_backend import DONE, Exchange, chunk, event, scripted_backend, streams
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until

STALLED = range(10101, 10151)
HEALTHY = range(10201, 10251)
LONG = [letter * 16_000 for letter in "abcdefghijklmnopqrst"]
MOST = 400_000
"""Maximum characters of an answer; LONG exceeds the default."""
SHORT = [f"word {n} " for n in range(40)]

MB = 1 << 20


async def _answer(exchange: Exchange) -> None:
    """Send long answers at once, short ones slowly."""
    if question_of(exchange.request) == "everything":
        await streams(*LONG)(exchange)
        return
    await exchange.start()
    for word in SHORT:
        await exchange.send(event(chunk(word)))
        await asyncio.sleep(0.005)
    await exchange.send(event(chunk(finish_reason="stop")), DONE)
    await exchange.end()


async def _round(healthy: dict[int, Peer], number: int) -> list[float]:
    """Ask once on every healthy socket; the seconds until each whole answer."""

    async def ask(user: int, someone: Peer) -> float:
        began = time.monotonic()
        await someone.chat(user, "something", f"round-{number}")
        told = await someone.end_of(f"round-{number}")
        assert told.text == "".join(SHORT)
        return time.monotonic() - began

    return await asyncio.gather(*(ask(user, someone) for user, someone in healthy.items()))


async def test_stalled_readers_cost_the_others_nothing_and_are_closed_in_time(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    stall = 8.0
    settings: dict[str, Any] = {"stall_timeout": f"{stall}s", "queue_limit": 200, "concurrency": 200}
    whole = len("".join(LONG))
    async with (
        scripted_backend(always=_answer) as backend,
        one_node(tmp_path, redis_server, backend.url, max_answer=MOST, **settings) as node,
        AsyncExitStack() as stack,
    ):
        process = psutil.Process(node.now.process.pid)
        healthy = {user: await stack.enter_async_context(node.peer(user)) for user in HEALTHY}
        before = await _round(healthy, 0)
        memory = process.memory_info().rss

        stalled = {user: await stack.enter_async_context(raw_user(node.port, user, narrow=True)) for user in STALLED}
        began = time.monotonic()
        for user, someone in stalled.items():
            await someone.send_frame(msgType="CHAT", userId=user, contents="everything", messageId="m1")
        beside = await _round(healthy, 1)
        assert time.monotonic() - began < stall  # they were stalled all the time, and not closed yet
        await wait_until(lambda: node.unfinished() == 0, "all answers are complete, read or unread")

        # A client that waited for a stalled reader would wait for the whole stall timeout.
        assert median(beside) < median(before) + stall / 3
        assert max(beside) < max(before) + stall / 2
        # 50 texts, and for each socket the frames of one pending write.
        assert process.memory_info().rss - memory < len(STALLED) * 3 * whole + 40 * MB

        await wait_until(lambda: node.clients() == len(HEALTHY), "the stalled sockets are aborted", limit=stall + 6)
        assert await _round(healthy, 2)
        for user in STALLED:
            assert node.recorded(user, "m1")[0] == "done"
        await stack.aclose()
        await node.settled()


async def test_who_stalled_and_then_reads_is_told_why_it_was_closed_and_resumes(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with (
        scripted_backend(always=_answer) as backend,
        one_node(tmp_path, redis_server, backend.url, stall_timeout="1s", max_answer=MOST) as node,
    ):
        user = STALLED[0]
        async with raw_user(node.port, user, narrow=True) as someone:
            await someone.send_frame(msgType="CHAT", userId=user, contents="everything", messageId="m1")
            await wait_until(lambda: "reader too slow" in node.now.process.output(), "it is closed")
            assert await someone.close_code() == 4002
            assert someone.texts[-1]["contents"] == Text.TOO_SLOW.zh
        seen = [told for told in someone.texts if told.get("event") == "delta"]
        assert not any(told.get("event") in TERMINAL for told in someone.texts)
        async with node.peer(user) as again:
            point = {"messageId": "m1", "attempt": seen[-1]["attempt"], "offset": seen[-1]["offset"]}
            await again.send_frame("INIT", userId=user, resume=[point])
            rest = await again.end_of("m1")
        assert "".join(told["contents"] for told in seen) + rest.text == "".join(LONG)
        await node.settled()


async def _flood(someone: RawSocket, data: bytes, total: int) -> int:
    """Send the same bytes repeatedly; how many were sent until the peer closed or stopped reading."""
    sent = 0
    try:
        while sent < total:
            await someone.send(data, limit=2)
            sent += len(data)
    except (ConnectionError, TimeoutError):
        pass
    return sent


async def test_pings_that_nobody_reads_the_answers_of_do_not_gather(redis_server: RedisServer, tmp_path: Path) -> None:
    async with (
        scripted_backend(always=_answer) as backend,
        one_node(tmp_path, redis_server, backend.url, frame_rate=0, max_answer=MOST) as node,
    ):
        process = psutil.Process(node.now.process.pid)
        memory = process.memory_info().rss
        async with raw_user(node.port, 10001, narrow=True) as someone, node.peer(10002) as healthy:
            await _flood(someone, frame(PING, b"x" * 125) * 400, 40 * MB)
            assert process.memory_info().rss - memory < 15 * MB
            await healthy.chat(10002, "something", "m1")
            assert (await healthy.end_of("m1")).text == "".join(SHORT)
        await node.settled()
