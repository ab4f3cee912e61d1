"""One node that can die and restart with the same id, port and Redis, and the checks after every fault."""

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import redis

from imstream.keys import GROUP, Keys
from imstream.user_ids import UserId
from tests.support.peer import TERMINAL, Peer, Told, peer
from tests.support.processes import free_port
from tests.support.redis_sets import Topology
from tests.support.servers import NodeProcess, RedisServer, start_node
from tests.support.stage import fresh_redis
from tests.support.waiting import SLOW, wait_until

QUICK: dict[str, object] = {
    "read_block": "250ms",
    "sweep_interval": "500ms",
    "retry_wait": "20ms",
    "user_limit": 100,
    "chats_per_minute": 0,
}
"""Settings for short waits, and with limits that one user does not reach."""

NO_IDENTITY = "users are not authenticated"
"""Beginning of the only warning that such a node logs at its start."""

NODE = ("-m", "imstream", "node")
CRASHING = ("-m", "tests.support.crashing_node")


@dataclass
class OneNode:
    """A node, its Redis and AI backend.

    Attributes:
        name: Its id.
        python: The interpreter of another release for its next start; None for this one.
        now: Its current process.
        fds: Number of open files when it became ready.
    """

    folder: Path
    redis: redis.Redis
    redis_url: str
    ai_url: str
    settings: dict[str, object]
    name: str = "0"
    port: int = field(default_factory=free_port)
    python: str | None = None
    now: NodeProcess = field(init=False)
    fds: int = field(default=0, init=False)

    def start_now(
        self, *, crash_at: str | None = None, command: tuple[str, ...] = NODE, wait: bool = True, **settings: object
    ) -> None:
        """Start or restart it; `crash_at` is a point of `tests.support.crashing_node`."""
        self.now = start_node(
            self.folder,
            redis_url=self.redis_url,
            ai_url=self.ai_url,
            node=self.name,
            port=self.port,
            settings={**self.settings, **settings},
            command=command if crash_at is None else (*CRASHING, "--at", crash_at),
            python=self.python,
            wait=wait,
        )
        if wait:
            self.fds = psutil.Process(self.now.process.pid).num_fds()

    async def start(
        self, *, crash_at: str | None = None, command: tuple[str, ...] = NODE, wait: bool = True, **settings: object
    ) -> None:
        """`start_now` without blocking the event loop."""
        await asyncio.to_thread(self.start_now, crash_at=crash_at, command=command, wait=wait, **settings)

    async def killed(self) -> None:
        """SIGKILL it."""
        await asyncio.to_thread(self.now.process.kill)

    async def died(self) -> int:
        """Wait until it has died by itself, and return its exit code."""
        await wait_until(lambda: self.now.process.process.poll() is not None, "the node is dead", limit=20)
        return self.now.process.wait()

    @asynccontextmanager
    async def kept_alive(self, *, crash_at: str) -> AsyncIterator[list[int]]:
        """Restart it whenever it dies, as a supervisor does. Yields the exit codes so far."""
        deaths: list[int] = []
        over = asyncio.Event()

        async def supervise() -> None:
            while not over.is_set():
                if (code := self.now.process.process.poll()) is not None:
                    deaths.append(code)
                    await self.start(crash_at=crash_at, wait=False)
                await asyncio.sleep(0.02)

        async with asyncio.TaskGroup() as group:
            group.create_task(supervise())
            try:
                yield deaths
            finally:
                over.set()

    async def terminated(self, limit: float = 15.0 * SLOW) -> int:
        """SIGTERM it and return its exit code."""
        return await asyncio.to_thread(self.now.process.terminate, limit)

    def peer(
        self, user: UserId, *, resume: dict[str, Told] | None = None, lang: str | None = None, token: str | None = None
    ) -> AbstractAsyncContextManager[Peer]:
        """Connect and log in."""
        return peer(self.now.ws(user), user=user, resume=resume, lang=lang, token=token)

    def ai_stats(self) -> dict[str, int]:
        """The demo backend's counters: calls, running, answered, faulty, abandoned."""
        with urllib.request.urlopen(f"{self.ai_url.removesuffix('/v1')}/stats", timeout=5) as answer:  # noqa: S310 - a URL of the test's own
            found: dict[str, int] = json.load(answer)
            return found

    def sessions(self) -> int:
        """Number of sockets that it reports."""
        with urllib.request.urlopen(f"{self.now.http}/readyz", timeout=5) as answer:  # noqa: S310 - a URL of the test's own
            found: dict[str, Any] = json.load(answer)
            return int(found["sessions"])

    # State in Redis

    def unfinished(self) -> int:
        """Number of requests in its stream."""
        return self.redis.xlen(Keys().requests(self.name))

    def pending(self) -> list[dict[str, Any]]:
        """The pending entries."""
        found: list[dict[str, Any]] = self.redis.xpending_range(Keys().requests(self.name), GROUP, "-", "+", 1000)
        return found

    def dead(self) -> list[dict[str, str]]:
        """The dead letters."""
        return self._entries(Keys().dead(self.name))

    def record(self, user: UserId, message_id: str) -> list[dict[str, str]]:
        """The entries of a reply stream."""
        return self._entries(Keys().reply(user, message_id))

    def recorded(self, user: UserId, message_id: str) -> tuple[str, str]:
        """The recorded answer: the terminal event and the text of the last attempt."""
        entries = self.record(user, message_id)
        terminal = [entry for entry in entries if entry["event"] in TERMINAL]
        assert len(terminal) == 1, f"{len(terminal)} terminal events of {message_id}"
        assert terminal[0] is entries[-1], f"something was said after the end of {message_id}"
        last = terminal[0]["attempt"]
        return terminal[0]["event"], "".join(entry.get("text", "") for entry in entries if entry["attempt"] == last)

    def events(self) -> dict[str, list[str]]:
        """The events of every reply stream, by its key."""
        keys = self.redis.scan_iter(Keys().reply(0, "*").replace("{user:0}", "*"))
        return {key: [fields["event"] for fields in self._entries(key)] for key in keys}

    def _entries(self, stream: str) -> list[dict[str, str]]:
        rows: Any = self.redis.xrange(stream)
        return [fields for _, fields in rows]

    def ended(self) -> int:
        """Number of messages with a terminal event."""
        return sum(not TERMINAL.isdisjoint(events) for events in self.events().values())

    # Checks after every fault

    async def settled(self) -> None:
        """Wait until there is no work, and check that every message has one end and nothing leaks."""
        await self.all_finished()
        await self.nothing_open()

    async def all_finished(self) -> None:
        """Wait until its stream is empty, and check that every message has one end."""
        await wait_until(lambda: self.unfinished() == 0, "every request is finished", limit=20)
        assert self.pending() == []
        await wait_until(lambda: not self.redis.exists(Keys().load(self.name)), "no user has a request left")
        for key, events in self.events().items():
            assert sum(event in TERMINAL for event in events) == 1, f"{key}: {events}"

    def clients(self) -> int:
        """Number of client sockets of the process."""
        connections = psutil.Process(self.now.process.pid).net_connections("tcp")
        return sum(one.laddr.port == self.port and bool(one.raddr) for one in connections)

    async def nothing_open(self) -> None:
        """Wait until the process has at most as many files as at its start: no client, only idle AI connections."""
        process = psutil.Process(self.now.process.pid)
        ai_port = int(self.ai_url.split(":")[2].split("/")[0])
        # Connections to Redis are opened on first use: those of the pipeline, the blocking reader, and those to the
        # Sentinels or to each node of a cluster.
        allowed = {"redis": 5, "redis+sentinel": 5 + 5, "redis+cluster": 3 * 5 + 2 * 6}
        lanes = allowed[self.redis_url.partition(":")[0]]

        def leaked() -> int:
            calls = [one for one in process.net_connections("tcp") if one.raddr and one.raddr.port == ai_port]
            return self.clients() or max(0, process.num_fds() - len(calls) - self.fds - lanes)

        await wait_until(lambda: leaked() == 0, "no file descriptor is left over")

    def logged(self, event: str | None = None, /, **fields: object) -> list[dict[str, Any]]:
        """The log lines of this process with an event and these fields."""
        wanted = fields if event is None else {"event": event, **fields}
        printed = self.now.process.output().splitlines()  # the last line may be incomplete
        lines = [json.loads(line) for line in printed if line.startswith("{") and line.endswith("}")]
        return [line for line in lines if wanted.items() <= line.items()]

    def check_log(self) -> None:
        """Check that it has printed no traceback."""
        output = self.now.process.output()
        assert "Traceback" not in output, output


@asynccontextmanager
async def one_node(
    folder: Path,
    redis_server: RedisServer,
    ai_url: str,
    *,
    crash_at: str | None = None,
    **settings: object,
) -> AsyncIterator[OneNode]:
    """Start a node with these settings. At the end, no process remains and none has printed a traceback."""
    with redis_server.client() as client:
        node = OneNode(folder, client, redis_server.url, ai_url, {**QUICK, **settings})
        await node.start(crash_at=crash_at)
        try:
            yield node
        finally:
            await asyncio.to_thread(node.now.process.__exit__, None, None, None)
        node.check_log()


@contextmanager
def standing_node(
    folder: Path,
    ai_url: str,
    on: Topology | None = None,
    command: tuple[str, ...] = NODE,
    python: str | None = None,
    /,
    **settings: object,
) -> Iterator[OneNode]:
    """Start a node for many tests that do not harm it, on this Redis or on its own."""
    with ExitStack() as stack:
        on = on or stack.enter_context(fresh_redis(folder))
        client = stack.enter_context(on.client())
        node = OneNode(folder, client, on.url, ai_url, {**QUICK, **settings}, python=python)
        node.start_now(command=command)
        stack.enter_context(node.now.process)
        yield node
