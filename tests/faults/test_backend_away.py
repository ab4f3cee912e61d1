"""A backend that is away: an outage fails no message, buries nothing, and does not end in a storm of calls."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from imstream.client import Busy, Client, RateLimited
from tests.support.one_node import OneNode, one_node
from tests.support.peer import peer
from tests.support.processes import http_status
from tests.support.scraping import metrics_become
from tests.support.scripted_backend import Exchange, Script, refuses, scripted_backend, streams
from tests.support.servers import RedisServer, start_demo
from tests.support.waiting import wait_until

DEFAULTS: dict[str, Any] = {
    "retry_wait": "500ms",
    "user_limit": 4,
    "chats_per_minute": 60,
    "read_block": "1s",
    "sweep_interval": "5s",
}
"""The defaults of settings that tests of faults shorten."""

WRONG_KEY = '{"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}}'


async def ask(node: OneNode, user: int, *questions: str) -> list[str]:
    """Ask as an application does, again when the node is busy; the answers."""
    async with Client(node.now.ws(), user) as client:

        async def answer(question: str) -> str:
            while True:
                try:
                    return await (await client.send(question)).text()
                except (Busy, RateLimited) as refused:
                    assert refused.retry_after is not None  # noqa: PT017 - each of them has it
                    await asyncio.sleep(refused.retry_after.total_seconds())

        return await asyncio.gather(*map(answer, questions))


class Weather:
    """A backend that works or is away, and when it was called."""

    def __init__(self, away: Script) -> None:
        self.is_away = False
        self.calls = list[float]()
        self._away = away

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one request."""
        self.calls.append(asyncio.get_running_loop().time())
        await (self._away if self.is_away else streams("All ", "well"))(exchange)

    def called_between(self, begin: float, end: float) -> int:
        """The number of calls in a time."""
        return sum(begin <= at < end for at in self.calls)


@asynccontextmanager
async def weather_and_node(
    folder: Path, redis_server: RedisServer, away: Script
) -> AsyncIterator[tuple[Weather, OneNode]]:
    """A node with default settings, and its backend."""
    weather = Weather(away)
    async with (
        scripted_backend(always=weather) as backend,
        one_node(folder, redis_server, backend.url, **DEFAULTS) as node,
    ):
        yield weather, node


@pytest.mark.parametrize(
    ("users", "seconds"), [(5, 3), pytest.param(50, 60, marks=[pytest.mark.long, pytest.mark.timeout(600)])]
)
async def test_an_outage_of_a_backend_fails_no_message(
    users: int, seconds: float, redis_server: RedisServer, tmp_path: Path
) -> None:
    demo = await asyncio.to_thread(start_demo, tmp_path, "--first", "0", "--pace", "0")
    with demo.process:
        async with one_node(tmp_path, redis_server, demo.url, **DEFAULTS) as node:
            assert await ask(node, 10001, "before")
            await asyncio.to_thread(demo.process.kill)
            async with asyncio.TaskGroup() as group:
                asking = [
                    group.create_task(ask(node, 10001 + n, *(f"question {m}" for m in range(4)))) for n in range(users)
                ]
                began = asyncio.get_running_loop().time()
                while asyncio.get_running_loop().time() - began < seconds:
                    assert await asyncio.to_thread(http_status, f"{node.now.http}/readyz") == 200
                    await asyncio.sleep(0.5)  # the outage lasts; readiness is looked at
                again = await asyncio.to_thread(start_demo, tmp_path, "--first", "0", "--pace", "0", port=demo.port)
                with again.process:
                    answers = [await one for one in asking]
            assert all("question" in answer for each in answers for answer in each)
            assert node.dead() == []
            await node.settled()


async def test_a_key_that_is_wrong_for_a_while_buries_nothing_and_is_logged_once(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with weather_and_node(tmp_path, redis_server, refuses(401, WRONG_KEY)) as (weather, node):
        weather.is_away = True
        async with asyncio.TaskGroup() as group:
            asking = [group.create_task(ask(node, 10001 + n, *"abcd")) for n in range(10)]
            await wait_until(lambda: len(weather.calls) >= 10, "many are refused")
            # Before the node knows that, a call may succeed between two refusals, and the second one is logged again.
            await metrics_become(node.now.http, {'imstream_ai_breaker_open{backend="default"}': 1})
            weather.is_away = False
            assert [await one for one in asking] == [["All well"] * 4] * 10
        output = node.now.process.output()
        assert output.count("backend is misconfigured") == 1
        assert "http_401" in output
        assert node.dead() == []
        await node.settled()


@pytest.mark.long  # the short relative: tests/unit/test_call_gate.py
async def test_an_outage_does_not_end_in_a_storm_of_calls(redis_server: RedisServer, tmp_path: Path) -> None:
    normal = 8  # chats a second
    async with weather_and_node(tmp_path, redis_server, refuses(503, "overloaded")) as (weather, node):
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:

            async def traffic(seconds: float) -> None:
                for number in range(int(seconds * normal)):
                    group.create_task(ask(node, 20001 + len(weather.calls) * 100 + number, "question"))
                    await asyncio.sleep(1 / normal)

            await traffic(5)
            weather.is_away = True
            await traffic(4)
            weather.is_away = False
            end = loop.time()
            await traffic(4)
        [back, *_] = [at for at in weather.calls if at >= end]
        normal_second = weather.called_between(end - 9, end - 4) / 5
        assert weather.called_between(back, back + 1) <= 2 * max(normal, normal_second)
        assert node.dead() == []
        await node.settled()


async def test_a_client_with_the_want_status_receives_that_its_message_waits(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with weather_and_node(tmp_path, redis_server, refuses(503, "overloaded")) as (weather, node):
        weather.is_away = True
        async with peer(node.now.ws(10001)) as someone, node.peer(10001) as plain:
            await someone.send_frame("INIT", userId=10001, wants=["status"])
            await someone.frame()
            await someone.chat(10001, "hello", "m")
            waiting = await someone.until(event="status", state="waiting")
            assert (waiting["messageId"], waiting["reason"]) == ("m", "http_503")
            weather.is_away = False
            told = await someone.end_of("m")
            events = [event for event in told.events if event != "delta"]
            assert events == ["accepted", "status", "status", "status", "done"]  # started, waiting, started
            assert (await plain.end_of("m")).text == told.text == "All well"
            assert "status" not in plain.told["m"].events
        [entry, *_] = [entry for entry in node.record(10001, "m") if entry["event"] == "waiting"]
        assert (entry["backend"], entry["reason"]) == ("default", "http_503")
        await node.settled()
