"""The set-up for faults of Redis: a Redis, the demo backend, a node and users, with checks at the end."""

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
from imstream.user_ids import UserId
from tests.support.chatter import Chatter, chatter
from tests.support.observing import ObservedNode, start_observed_node
from tests.support.processes import free_port
from tests.support.redis_sets import Topology
from tests.support.servers import DemoBackend, RedisServer, valkey_binary
from tests.support.waiting import wait_until

KEYS = Keys()
REQUESTS, LOAD, DEAD = KEYS.requests("0"), KEYS.load("0"), KEYS.dead("0")

QUICK = {
    "redis_timeout": "1s",
    "read_block": "300ms",
    "sweep_interval": "500ms",
    "flush_interval": "50ms",
    "drain_grace": "3s",
    "chats_per_minute": 0,
}
"""Short durations for faults, and no rate limits for clients that retry."""

AT_ONCE = "[[demo first=0s pace=0s]]"
"""Marker for an immediate answer of the demo backend."""

MEMORY_LIMIT = 160 * 2**20
"""Maximum memory of a node at the end in bytes; it begins with about 60 MB."""


@contextmanager
def fresh_redis(folder: Path, *options: str) -> Iterator[RedisServer]:
    """A server for one test, which may kill, stop and damage it."""
    server = RedisServer(valkey_binary(), free_port(), folder / "redis", options)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@dataclass
class Stage:
    """The parts of a test.

    Attributes:
        redis: A client of the test that bypasses every proxy.
        users: All logged-in users.
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

    async def user(self, user_id: UserId = 10001, **how: list[dict[str, object]]) -> Chatter:
        """Log in a user until the end; `resume` as in INIT."""
        one = await self._stack.enter_async_context(chatter(self.node.ws(user_id), user_id, **how))
        self.users.append(one)
        return one

    def ai_calls(self) -> int:
        """Calls of the AI backend since the start of the node."""
        return _ai_calls(self.demo) - self._calls_before

    def unfinished(self) -> int:
        """Number of requests in the stream."""
        return int(self.redis.xlen(REQUESTS))

    def admitted_ever(self) -> int:
        """Number of requests ever added to the stream."""
        return int(self.redis.xinfo_stream(REQUESTS)["entries-added"])

    def being_worked_on(self) -> int:
        """Number of pending requests."""
        return int(self.redis.xpending(REQUESTS, GROUP)["pending"])

    async def start_node_again(self, **settings: object) -> None:
        """Restart the node in another process. Its users must log in again."""
        self.node = await start_observed_node(
            self.folder, redis_url=self.redis_url, ai_url=self.demo.url, settings={**QUICK, **settings}
        )
        self._stack.push(self.node.process)

    async def curtain(self) -> None:
        """Wait for all answers, and check that each is complete and recorded once, and that nothing leaks."""
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
        """Check that a message has one terminal event, as its last entry; none is required if it was not accepted."""
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
    """The demo backend's answer to a question."""
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
    """Run a test with a node. If it does not fail, it ends with `Stage.curtain` and a drain of the node.

    Args:
        server: The Redis.
        demo: The AI backend.
        folder: Folder of the node's log.
        redis_url: Redis' URL through a proxy; None for the direct one.
        wait: Whether to wait until the node is ready.
        settings: Settings of the node, in addition to `QUICK`.
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
