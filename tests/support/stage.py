"""A stage for faults of Redis: a Redis, the demo backend, a node, users; and what must hold when the play is over."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from imstream.demo.answer import canned_answer
from imstream.keys import GROUP, Keys
from tests.support.chatter import Chatter, chatter
from tests.support.observing import ObservedNode, start_observed_node
from tests.support.processes import free_port
from tests.support.redis_sets import Topology
from tests.support.servers import DemoBackend, RedisServer, valkey_binary
from tests.support.waiting import wait_until

KEYS = Keys()
REQUESTS, LOAD, DEAD = KEYS.requests("0"), KEYS.load("0"), KEYS.dead("0")

QUICK = {
    "redis_timeout": "500ms",
    "read_block": "300ms",
    "sweep_interval": "500ms",
    "flush_interval": "50ms",
    "drain_grace": "3s",
    "chats_per_minute": 0,
}
"""Settings that make a test short: the durations that faults are measured by; and no pace, for who tries and tries."""

AT_ONCE = "[[demo first=0s pace=0s]]"
"""Makes the demo backend answer a question at once."""

MEMORY_LIMIT = 160 * 2**20
"""Bytes that a node may have at the end: it begins with about 60 MB, and nothing in these tests is large."""


@contextmanager
def fresh_redis(folder: Path, *options: str) -> Iterator[RedisServer]:
    """A server for one test, which may kill, stop and spoil it."""
    server = RedisServer(valkey_binary(), free_port(), folder / "redis", options)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@dataclass
class Stage:
    """What plays in a test.

    Attributes:
        redis: A client of the test's own, past every proxy.
        users: Everybody who is logged in.
    """

    folder: Path
    server: Topology
    demo: DemoBackend
    redis: redis.Redis
    redis_url: str
    node: ObservedNode
    _stack: AsyncExitStack
    _calls_before: int
    users: list[Chatter] = field(default_factory=list)

    async def user(self, user_id: int = 10001, **how: list[dict[str, object]]) -> Chatter:
        """A user who is logged in until the end. Also `resume`, as in INIT."""
        one = await self._stack.enter_async_context(chatter(self.node.ws(user_id), user_id, **how))
        self.users.append(one)
        return one

    def ai_calls(self) -> int:
        """Calls of the AI backend since the node was started."""
        return _ai_calls(self.demo) - self._calls_before

    def unfinished(self) -> int:
        """Requests in the stream."""
        return int(self.redis.xlen(REQUESTS))

    def admitted_ever(self) -> int:
        """Requests that were ever put into the stream."""
        return int(self.redis.xinfo_stream(REQUESTS)["entries-added"])

    def being_worked_on(self) -> int:
        """Requests that were given to a worker and are not finished."""
        return int(self.redis.xpending(REQUESTS, GROUP)["pending"])

    async def start_node_again(self, **settings: object) -> None:
        """Start another process of the same node. Its users have to log in anew."""
        self.node = await start_observed_node(
            self.folder, redis_url=self.redis_url, ai_url=self.demo.url, settings={**QUICK, **settings}
        )
        self._stack.push(self.node.process)

    async def curtain(self) -> None:
        """Wait for all that was promised, and see that it was kept: once, whole, and with nothing left over."""
        for user, message_id, question in self._promised():
            await user.ended(message_id)
            assert user.ends(message_id) == ["done"], (message_id, user.frames[message_id][-4:])
            assert user.text(message_id) == expected(question)
        await wait_until(lambda: self.unfinished() == 0, "the requests stream is empty", limit=20)
        assert self.being_worked_on() == 0
        assert self.redis.hgetall(LOAD) == {}
        assert self.redis.xlen(DEAD) == 0
        for user in self.users:
            for message_id, question in user.asked.items():
                self._check_record(user, message_id, question)
        forever = {key for key in self.redis.scan_iter() if self.redis.ttl(key) == -1}
        assert forever <= {REQUESTS, LOAD, DEAD, KEYS.nodes()}
        assert self.node.memory() < MEMORY_LIMIT

    def _promised(self) -> Iterator[tuple[Chatter, str, str]]:
        for user in self.users:
            for message_id in user.accepted:
                if user.close_code is None:
                    yield user, message_id, user.asked[message_id]

    def _check_record(self, user: Chatter, message_id: str, question: str) -> None:
        """A message has one terminal event, its last entry; one that was not accepted may have none at all."""
        rows: Any = self.redis.xrange(KEYS.reply(user.user_id, message_id))
        entries = [fields for _, fields in rows]
        ends = [entry["event"] for entry in entries if entry["event"] in ("done", "failed", "cancelled")]
        if message_id not in user.accepted and not ends:
            return
        assert ends == ["done"], f"{message_id}: {ends}"
        assert entries[-1]["event"] == "done", f"{message_id}: something was said after its end"
        last = [entry for entry in entries if entry["attempt"] == entries[-1]["attempt"]]
        assert "".join(entry.get("text", "") for entry in last) == expected(question)


def expected(question: str) -> str:
    """What the demo backend answers to a question."""
    return "".join(canned_answer(question))


def _ai_calls(demo: DemoBackend) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{demo.port}/stats", timeout=5) as answer:
        return int(json.load(answer)["calls"])


@asynccontextmanager
async def stage(
    server: Topology,
    demo: DemoBackend,
    folder: Path,
    *,
    redis_url: str | None = None,
    wait: bool = True,
    **settings: object,
) -> AsyncIterator[Stage]:
    """Start a node and play. A play that did not fail ends with `Stage.curtain`, and the node drains in good order.

    Args:
        server: The Redis.
        demo: The AI backend.
        folder: Where the node's log is written.
        redis_url: The way to Redis, when it is not the direct one.
        wait: Whether the node shall be ready before the play begins.
        settings: Settings of the node, beside those of `QUICK`.
    """
    redis_url = redis_url or server.url
    async with AsyncExitStack() as stack:
        client = stack.enter_context(server.client())
        calls = _ai_calls(demo)
        given = {**QUICK, **settings}
        node = await start_observed_node(folder, redis_url=redis_url, ai_url=demo.url, settings=given, wait=wait)
        stack.push(node.process)
        playing = Stage(folder, server, demo, client, redis_url, node, stack, calls)
        yield playing
        await playing.curtain()
        assert await asyncio.to_thread(playing.node.process.terminate) == 0
