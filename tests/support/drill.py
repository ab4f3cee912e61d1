"""Nodes with traffic that a real Prometheus watches, for faults that have to fire an alert.

Panels of the dashboard are logged during a fault: `ops/test --all tests/faults/test_alerts.py --log-cli-level=info`.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from imstream.client import Client, ClientError
from tests.support.one_node import NODE, OneNode
from tests.support.prometheus import Prometheus, prometheus
from tests.support.scripted_backend import Exchange, Script, refuses, scripted_backend, streams
from tests.support.servers import RedisServer
from tests.support.tcp_proxy import TcpProxy, tcp_proxy
from tests.support.waiting import wait_until

WITHIN = 60.0
"""Seconds from a fault to its alert."""

USERS = 6
PAUSE = 1.5
"""Seconds between an answer and the next question of the same user."""

KEY = "sk-right"
WRONG_KEY = '{"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}}'

log = logging.getLogger(__name__)


@dataclass
class Backend:
    """A backend in its usual state, or with a fault. `faulty`: the fault of its n-th call; None: none."""

    key: str = KEY
    faulty: Callable[[int], Script | None] = field(default=lambda _: None)
    calls: int = 0

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one request."""
        call, self.calls = self.calls, self.calls + 1
        script = self.faulty(call) or streams("All ", "well", usage={"completion_tokens": 2})
        if exchange.request.headers["authorization"] != f"Bearer {self.key}":
            script = refuses(401, WRONG_KEY)
        await script(exchange)


@dataclass
class Drill:
    """Nodes with traffic, watched by Prometheus."""

    nodes: list[OneNode]
    backend: Backend
    proxy: TcpProxy
    watching: Prometheus

    async def fires(self, *alerts: str, part: str, watch: float = WITHIN, within: float = WITHIN) -> None:
        """Wait for the alerts of a fault that has just begun. Meanwhile and for `watch` s, only `part` is blamed."""
        loop = asyncio.get_running_loop()
        began, seen, after = loop.time(), dict[str, str](), dict[str, float]()
        while (passed := loop.time() - began) < (within if len(after) < len(alerts) else watch):
            seen |= await self.watching.firing()
            after |= {alert: round(passed) for alert in alerts if alert in seen and alert not in after}
            await asyncio.sleep(0.5)  # the fault lasts; alerts are looked at
        assert set(after) == set(alerts), f"within {within} s: {seen}"
        log.info("seconds until they fire: %s; all alerts: %s", after, seen)
        assert set(seen.values()) <= {part, "answers"}, f"other parts are blamed: {seen}"

    async def shows(self, title: str) -> dict[str, float]:
        """The values of a panel of the dashboard, by legend."""
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
                log.debug("user %s is told: %s", user, error)
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
    folder: Path,
    redis_server: RedisServer,
    *names: str,
    command: tuple[str, ...] = NODE,
    waits: Mapping[str, str] | None = None,
    **settings: object,
) -> AsyncIterator[Drill]:
    """Nodes with the default settings and some traffic, seen by Prometheus for some scrapes without an alert.

    `waits`: other values of `for`, by alert.
    """
    backend = Backend()
    async with AsyncExitStack() as stack:
        ai = await stack.enter_async_context(scripted_backend(always=backend))
        proxy = await stack.enter_async_context(tcp_proxy(redis_server.port))
        client = stack.enter_context(redis_server.client())
        nodes = [
            OneNode(folder, client, proxy.url, ai.url, {"ai_key": KEY, **settings}, name=name)
            for name in names or ("0",)
        ]
        for node in nodes:
            await node.start(command=command)
            stack.push_async_callback(asyncio.to_thread, node.now.process.__exit__, None, None, None)
        targets = [f"127.0.0.1:{node.port}" for node in nodes]
        watching = await stack.enter_async_context(prometheus(folder, *targets, waits=waits))
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
            await node.killed()  # remains of the fault, such as waiting messages, need no drain


def highest(samples: dict[str, float], *words: str) -> float:
    """The highest value of the curves whose legend has all these words."""
    return max(value for legend, value in samples.items() if all(word in legend for word in words))
