"""Pipelining to one server: commands of one event-loop iteration travel together, over a few connections.

A command with a round trip of its own costs the client several times as much as one of many in a pipeline. So
`Pipeline.send` queues the command, and the first idle connection takes all that have gathered.

Nothing is ever repeated here. After a time-out the outcome is unknown, and the caller decides (each Lua script may be
repeated).
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from redis.asyncio import ConnectionPool

from imstream.errors import StoreUnavailable
from imstream.redis.connection import ASKING, CLOSED, Argument, Command, RedisConnection, fail_all, pack

MAX_WAITING = 10_000
"""Maximum number of queued commands. When it is reached Redis hangs, and the next is refused: `StoreUnavailable`."""

MAX_BATCH = 500  # maximum number of commands in a batch, which bounds how long its first reply is delayed
SCANNED_AT_ONCE = 1_000  # keys that one SCAN looks at: it takes Redis less than a millisecond

MAX_BATCH_DELAY = 0.005
"""Seconds that a command that is not urgent waits for others. Each saved round trip saves both sides 60 µs of CPU."""


class Pipeline:
    """Sends commands to one server in shared batches. It owns the pool and the connections."""

    def __init__(
        self, pool: ConnectionPool, connect: Callable[..., RedisConnection], *, connections: int, max_batch: int
    ) -> None:
        """`connect`: makes a connection from the pool and `on_idle`."""
        self._pool = pool
        self._max_batch = max_batch
        self._queue: deque[Command] = deque()
        self._loop = asyncio.get_running_loop()
        self._connections = [connect(pool, on_idle=self._on_idle) for _ in range(connections)]
        self._idle = list(self._connections)
        self._flush_scheduled = False
        self._delayed_flush: asyncio.TimerHandle | None = None
        self._closed = False

    async def aclose(self) -> None:
        """Fail all commands and close the connections and the pool."""
        self._closed = True
        if self._delayed_flush is not None:
            self._delayed_flush.cancel()
        fail_all([reply for _, reply in self._queue], StoreUnavailable(CLOSED))
        self._queue.clear()
        await asyncio.gather(*(connection.aclose() for connection in self._connections))
        await self._pool.aclose()

    async def send(self, *command: Argument, asking: bool = False, urgent: bool = True) -> Any:  # noqa: ANN401 - what Redis answers
        """Send one command and wait for its reply. Raises as `RedisClient.execute` does.

        `asking`: its key belongs to a slot that is being moved to this server. Unless it is `urgent`, it waits up to
        `MAX_BATCH_DELAY` for others.
        """
        if self._closed:
            raise StoreUnavailable(CLOSED)
        if len(self._queue) >= MAX_WAITING:
            raise StoreUnavailable(f"{MAX_WAITING} commands are waiting for Redis already")
        reply: asyncio.Future[Any] = self._loop.create_future()
        packed = pack(command)  # here, because an invalid command is an error of its caller, not of a whole batch
        if asking:
            self._queue.append(ASKING)
        self._queue.append((packed, reply))
        if self._max_batch == 1:
            self._flush()  # nothing can join it
        elif not urgent:
            if self._delayed_flush is None:
                self._delayed_flush = self._loop.call_later(MAX_BATCH_DELAY, self._flush_delayed)
        elif self._idle and not self._flush_scheduled:
            # In the next iteration of the event loop: until then, commands of other callers join this batch.
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)
        try:
            return await reply
        except asyncio.CancelledError:
            if self._max_batch == 1:
                await self._withdraw(reply)
            raise
        finally:
            # An error in it refers to this frame, and through it to all callers with their variables: a cycle.
            del reply

    async def _withdraw(self, cancelled: asyncio.Future[Any]) -> None:
        for index, (_, reply) in enumerate(self._queue):
            if reply is cancelled:  # it waits behind a blocked read, which continues
                del self._queue[index]
                if index and self._queue[index - 1] is ASKING:
                    del self._queue[index - 1]
                return
        # It may be a blocked read: entries that Redis delivers now would be lost from view.
        await asyncio.gather(*(connection.aclose() for connection in self._connections))

    async def masters(self) -> "dict[str, Pipeline]":
        """This server, the only master. See `Cluster.masters`."""
        return {"": self}

    async def scan(self, pattern: str) -> set[str]:
        """The keys of this server that match a pattern. Raises as `send` does."""
        found, cursor = set[str](), "0"
        while True:
            cursor, keys = await self.send("SCAN", cursor, "MATCH", pattern, "COUNT", SCANNED_AT_ONCE)
            found.update(keys)
            if str(cursor) == "0":
                return found

    def _flush_delayed(self) -> None:
        self._delayed_flush = None
        self._flush()

    def _flush(self) -> None:
        self._flush_scheduled = False
        while self._queue and self._idle:
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), self._max_batch))]
            if batch[-1] is ASKING:  # it must travel with the command after it
                batch.append(self._queue.popleft())
            self._idle.pop().send(batch)

    def _on_idle(self, connection: RedisConnection) -> None:
        self._idle.append(connection)
        if not self._closed:
            self._flush()
