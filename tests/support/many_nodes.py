"""Several nodes on one Redis that can be killed, frozen and restarted while users move between them.

async with many_nodes(folder, demo.url, "a", "b") as nodes:
async with nodes["a"].peer(USER) as someone: ...
await nodes["a"].killed()
await nodes.settled()
"""

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from imstream.keys import Keys
from imstream.user_ids import UserId
from tests.support.one_node import QUICK, OneNode
from tests.support.processes import free_port
from tests.support.servers import RedisServer, valkey_binary
from tests.support.waiting import wait_until

LEASE: dict[str, object] = {**QUICK, "lease": "1s"}
"""Settings with which a death is detected within a second."""


@dataclass
class ManyNodes:
    """Nodes by name, with their Redis and AI backend.

    Attributes:
        calls_before: Calls of the AI backend before the test.
    """

    server: RedisServer
    redis: redis.Redis
    nodes: dict[str, OneNode] = field(default_factory=dict)
    calls_before: int = 0

    def __getitem__(self, name: str) -> OneNode:
        return self.nodes[name]

    @property
    def any(self) -> OneNode:
        """Any of the nodes, for records and the AI backend, which they share."""
        return next(iter(self.nodes.values()))

    def urls(self, *first: str) -> list[str]:
        """Their WebSocket URLs, those named `first` in front."""
        names = [*first, *(name for name in self.nodes if name not in first)]
        return [f"ws://127.0.0.1:{self.nodes[name].port}/ws" for name in names]

    def ai_calls(self) -> int:
        """Calls of the AI backend since the test began."""
        return self.any.ai_stats()["calls"] - self.calls_before

    def is_dead(self, name: str) -> bool:
        """Whether no process runs this node."""
        return self.nodes[name].now.process.process.poll() is not None

    async def start(self, *names: str) -> None:
        """Start or restart nodes at the same time."""
        await asyncio.gather(*(self.nodes[name].start() for name in names))

    async def killed(self, *names: str) -> None:
        """SIGKILL several at once."""
        for name in names:
            self.nodes[name].now.process.process.kill()
        await asyncio.gather(*(self.nodes[name].killed() for name in names))

    async def mended(self) -> None:
        """Restart all that died, and wait until no request of the test before remains."""
        await self.start(*(name for name in self.nodes if self.is_dead(name)))
        for key in self.any.events():
            self.redis.delete(key)
        self.calls_before = self.any.ai_stats()["calls"]

    # Shared state in Redis

    def holder(self, name: str) -> dict[str, Any] | None:
        """The holder of a node's lease."""
        text: Any = self.redis.get(Keys().lease(name))
        return None if text is None else dict(json.loads(text))

    def opened_by(self, user: UserId, message_id: str) -> list[str]:
        """The nodes that began attempts at a message, in order."""
        return [entry["by"] for entry in self.any.record(user, message_id) if entry["event"] == "opened"]

    async def opened(self, user: UserId, message_id: str, attempts: int) -> list[str]:
        """Wait for that many attempts, and return their nodes."""
        await wait_until(lambda: len(self.opened_by(user, message_id)) == attempts, f"attempt {attempts} has begun")
        return self.opened_by(user, message_id)

    async def settled(self) -> None:
        """Wait until no node has work, and check that every message has one end and nothing leaks."""
        for node in self.nodes.values():
            await node.all_finished()
        for name, node in self.nodes.items():
            if not self.is_dead(name):
                await node.nothing_open()
        permanent = {
            key for name in self.nodes for key in (Keys().requests(name), Keys().load(name), Keys().dead(name))
        }
        forever = {key for key in self.redis.scan_iter() if self.redis.ttl(key) == -1}
        assert forever <= {*permanent, Keys().nodes()}

    async def left_alone(self) -> None:
        """Wait until no stream is adopted: a third of a lease after the last request."""
        await wait_until(lambda: not self.redis.exists(*map(Keys().adopter, self.nodes)), "no stream is adopted")

    def check_logs(self) -> None:
        """Check that no node has printed a traceback."""
        for node in self.nodes.values():
            node.check_log()


def why_not(node: OneNode, path: str) -> str | None:
    """The reason of a 503 of `/readyz` or `/healthz`; None for a 200."""
    try:
        with urllib.request.urlopen(f"{node.now.http}{path}", timeout=5):  # noqa: S310 - a URL of the test's own
            return None
    except urllib.error.HTTPError as refused:
        with refused:
            return str(json.load(refused)["why"])
    except OSError:
        return "nobody answers"


async def becomes(node: OneNode, why: str | None, path: str = "/readyz", *, limit: float = 10.0) -> None:
    """Wait for a 503 with this reason; None waits for a 200."""

    async def has_become() -> bool:
        return await asyncio.to_thread(why_not, node, path) == why

    await wait_until(has_become, f"node {node.name} says {why!r} at {path}", limit=limit)


@contextmanager
def standing_nodes(
    folder: Path, ai_url: str, *names: str, pythons: Mapping[str, str] | None = None, **settings: object
) -> Iterator[ManyNodes]:
    """Start nodes for many tests; `ManyNodes.mended` restarts those that the test before has killed.

    `pythons` maps names of nodes to the interpreter of another release.
    """
    pythons = pythons or {}
    server = RedisServer(valkey_binary(), free_port(), folder / "redis")
    server.start()
    try:
        with server.client() as client:
            found = {
                name: OneNode(
                    folder, client, server.url, ai_url, {**LEASE, **settings}, name=name, python=pythons.get(name)
                )
                for name in names
            }
            try:
                with ThreadPoolExecutor() as threads:
                    list(threads.map(OneNode.start_now, found.values()))
                yield ManyNodes(server, client, found)
            finally:
                for node in found.values():
                    node.now.process.__exit__(None, None, None)
    finally:
        server.stop()


@asynccontextmanager
async def many_nodes(
    folder: Path, ai_url: str, *names: str, pythons: Mapping[str, str] | None = None, **settings: object
) -> AsyncIterator[ManyNodes]:
    """Start nodes for one test; see `standing_nodes`."""
    with standing_nodes(folder, ai_url, *names, pythons=pythons, **settings) as nodes:
        await nodes.mended()
        yield nodes
        nodes.check_logs()
