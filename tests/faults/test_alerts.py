"""A drill: each fault fires its alert in a real Prometheus within a minute, and none that blames another part.

What the dashboard shows of each fault is logged: `ops/test --all tests/faults/test_alerts.py --log-cli-level=info`.
"""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from imstream.client import Client, ClientError
from tests.support.chatter import Chatter, chatter
from tests.support.one_node import NODE, OneNode
from tests.support.prometheus import Prometheus, prometheus
from tests.support.scripted_backend import Exchange, Script, refuses, scripted_backend, streams
from tests.support.servers import RedisServer
from tests.support.tcp_proxy import TcpProxy, tcp_proxy
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]  # the short relative: tests/unit/test_prometheus.py

WITHIN = 60.0
"""Seconds from a fault to its alert."""

USERS = 6
PAUSE = 1.5
"""Seconds between an answer and the next question of the same user."""

KEY = "sk-right"
WRONG_KEY = '{"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}}'
BUSY = '{"error": {"message": "slow down", "code": "rate_limit_exceeded"}}'

SLOW_AI = 12.0
SLOW_REDIS = 0.15
"""Seconds that the faults take."""

log = logging.getLogger(__name__)


@dataclass
class Backend:
    """A backend in its usual state, or with a fault. `faulty`: the fault of its n-th call; None: none."""

    key: str = KEY
    faulty: Callable[[int], Script | None] = field(default=lambda _: None)
    calls: count[int] = field(default_factory=count)

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one request."""
        script = self.faulty(next(self.calls)) or streams("All ", "well", usage={"completion_tokens": 2})
        if exchange.request.headers["authorization"] != f"Bearer {self.key}":
            script = refuses(401, WRONG_KEY)
        await script(exchange)


async def slowly(exchange: Exchange) -> None:
    """A script: the answer begins late."""
    await asyncio.sleep(SLOW_AI)
    await streams("At ", "last")(exchange)


@dataclass
class Drill:
    """Nodes with traffic, watched by Prometheus."""

    nodes: list[OneNode]
    backend: Backend
    proxy: TcpProxy
    watching: Prometheus

    async def fires(self, alert: str, *, part: str) -> None:
        """Wait for the alert of a fault that has just begun; then, until a minute is over, nothing else is blamed."""
        loop = asyncio.get_running_loop()
        began, seen, after = loop.time(), dict[str, str](), None
        while (passed := loop.time() - began) < WITHIN:
            seen |= await self.watching.firing()
            if after is None and alert in seen:
                after = passed
            await asyncio.sleep(0.5)  # the fault lasts; alerts are looked at
        assert after is not None, f"{alert} does not fire within {WITHIN} s, but {seen}"
        log.info("%s fires after %.0f s; within a minute: %s", alert, after, seen)
        assert set(seen.values()) <= {part, "answers"}, f"other parts are blamed: {seen}"

    async def shows(self, title: str) -> dict[str, float]:
        """What a panel of the dashboard shows, by legend."""
        shown = await self.watching.panel(title)
        log.info("%s: %s", title, ", ".join(map(str, shown)))
        assert shown, f"{title} shows nothing"
        return {sample.labels["legend"]: sample.value for sample in shown}


async def converse(node: OneNode, user: int) -> None:
    """Ask, wait for the answer, and ask again, until cancelled."""
    async with Client(node.now.ws(), user) as client:
        for number in count():
            try:
                await (await client.send(f"question {number}")).text()
            except ClientError as error:  # such as Unavailable
                log.info("user %s is told: %s", user, error)
            await asyncio.sleep(PAUSE)


@asynccontextmanager
async def running(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run traffic until the end of the context."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in work]
        yield
        for task in tasks:
            task.cancel()


@asynccontextmanager
async def drill(
    folder: Path, redis_server: RedisServer, *names: str, command: tuple[str, ...] = NODE
) -> AsyncIterator[Drill]:
    """Nodes with the default settings and some traffic, seen by Prometheus for some scrapes without an alert."""
    backend = Backend()
    async with AsyncExitStack() as stack:
        ai = await stack.enter_async_context(scripted_backend(always=backend))
        proxy = await stack.enter_async_context(tcp_proxy(redis_server.port))
        client = stack.enter_context(redis_server.client())
        nodes = [OneNode(folder, client, proxy.url, ai.url, {"ai_key": KEY}, name=name) for name in names or ("0",)]
        for node in nodes:
            await node.start(command=command)
            stack.push_async_callback(asyncio.to_thread, node.now.process.__exit__, None, None, None)
        targets = [f"127.0.0.1:{node.port}" for node in nodes]
        watching = await stack.enter_async_context(prometheus(folder, *targets))
        traffic = [converse(node, 10001 + number) for node in nodes for number in range(USERS)]
        await stack.enter_async_context(running(*traffic))

        async def is_seen() -> bool:
            found = await watching.query('imstream:messages:increase1m{outcome="done"} > 10')
            return bool(found) and len(await watching.query("count_over_time(up[1m]) >= 4")) == len(nodes)

        await wait_until(is_seen, "Prometheus sees the traffic", limit=20)
        assert await watching.firing() == {}
        yield Drill(nodes, backend, proxy, watching)
        for node in nodes:
            node.check_log()
            await node.killed()  # what is left of the fault, such as waiting messages, needs no drain


def highest(samples: dict[str, float], *words: str) -> float:
    """The highest value of the curves whose legend has all these words."""
    return max(value for legend, value in samples.items() if all(word in legend for word in words))


async def test_an_ai_that_is_slow_for_some_is_blamed_for_late_answers(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with drill(tmp_path, redis_server) as play:
        play.backend.faulty = lambda call: slowly if call % 4 == 0 else None
        await play.fires("ImstreamAISlow", part="ai")
        assert highest(await play.shows("First text"), "p95") > 10
        assert highest(await play.shows("Queue wait"), "p95") < 1
        assert highest(await play.shows("Round trip"), "p95") < 0.1


async def test_an_overloaded_ai_is_told_from_a_slow_one(redis_server: RedisServer, tmp_path: Path) -> None:
    async with drill(tmp_path, redis_server) as play:
        busy = refuses(429, BUSY, headers={"Retry-After": "1"})
        play.backend.faulty = lambda call: busy if call % 10 < 7 else None
        await play.fires("ImstreamAIOverloaded", part="ai")
        assert highest(await play.shows("Repeated calls, by reason"), "http_429") > 0.05
        assert highest(await play.shows("Calls, by result"), "away") > 0.05
        await play.shows("First text")


async def test_a_key_that_the_backend_refuses_is_named(redis_server: RedisServer, tmp_path: Path) -> None:
    async with drill(tmp_path, redis_server) as play:
        play.backend.key = "sk-another"
        await play.fires("ImstreamAIKeyRefused", part="ai")
        assert highest(await play.shows("Repeated calls, by reason"), "http_401") > 0
        assert highest(await play.shows("Breaker open"), "default") == 1
        assert (await play.shows("Backends away"))[""] == 1
        await play.shows("Requests")


async def test_a_slow_redis_is_blamed_and_not_the_nodes_or_the_ai_that_wait_for_it(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with drill(tmp_path, redis_server) as play:
        play.proxy.delay = SLOW_REDIS
        await play.fires("ImstreamRedisSlow", part="redis")
        assert highest(await play.shows("Round trip"), "p95") > 0.1
        assert highest(await play.shows("Event loop lag, p95")) < 0.25
        assert highest(await play.shows("Redis answers")) == 1


async def test_a_node_whose_consumer_hangs_is_named_and_the_other_one_is_not(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    wedged = ("-m", "tests.support.wedged_node")
    async with drill(tmp_path, redis_server, "a", "b", command=wedged) as play:
        play.nodes[0].now.process.signal(signal.SIGUSR1)
        await play.fires("ImstreamNodeStuck", part="node")
        [blamed] = await play.watching.query('ALERTS{alertname="ImstreamNodeStuck",alertstate="firing"}')
        assert blamed.labels["stream"] == "a"
        waiting = await play.shows("Waiting requests")
        assert waiting["a"] >= USERS
        assert waiting["b"] < USERS
        assert (await play.shows("Oldest request"))["a"] > 10
        assert set((await play.shows("Redis answers")).values()) == {1}
        assert set((await play.shows("Lease and scrapes")).values()) == {1}


async def test_one_user_who_floods_is_reported_and_costs_nobody_else_an_alert(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with drill(tmp_path, redis_server) as play:
        url = play.nodes[0].now.ws()
        async with chatter(url, 20001) as flooder, running(flood(flooder)):
            await play.fires("ImstreamUserFlooding", part="clients")
            results = await play.shows("CHAT frames, by result")
            assert results["rate_limited"] > 10
            assert results["busy"] == results["unavailable"] == 0
            assert highest(await play.shows("First text"), "p95") < 5
            assert (await play.shows("Availability of answers"))[""] == 1


async def flood(flooder: Chatter) -> None:
    """Send messages far above the limit, until cancelled."""
    for number in count():
        await flooder.send(f"m{number}", "again and again")
        await asyncio.sleep(0.04)
