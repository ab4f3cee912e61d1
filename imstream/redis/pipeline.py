"""How commands reach one server: those of one event-loop tick travel together, over a few connections.

A command of its own round trip costs the client several times what it costs as one of many in a pipeline. So nobody
sends by himself: `Pipeline.send` queues, and the first free lane takes all that has gathered.

Nothing is ever repeated here. A time-out means that the outcome is unknown; whoever asked decides (see the scripts:
each may be repeated).
"""

from __future__ import annotations

import asyncio
from collections import deque
from datetime import timedelta
from typing import Any

from hiredis import pack_command
from redis.asyncio import ConnectionPool

from imstream.errors import StoreUnavailable
from imstream.redis.connection import CLOSED, RedisConnection, Waiting, give_up
from imstream.redis.errors import AccessLog

MAX_WAITING = 10_000
"""Most commands that wait for a lane. When it is reached Redis is hung, and the next is refused: `StoreUnavailable`."""

MAX_BATCH = 500
"""Most commands that share a pipeline, so that a batch never delays its first answer by much."""

MAX_BATCH_DELAY = 0.005
"""Seconds that a command without urgent waits for others. A round trip less saves both sides 60 µs of CPU and more."""

ASKING = b"*1\r\n$6\r\nASKING\r\n"
"""Lets the next command of its connection have a key of a slot that is being moved here."""

Argument = str | int | bytes


class Pipeline:
    """Sends commands to one server in shared pipelines. It owns the pool, and a line for each lane."""

    def __init__(self, pool: ConnectionPool, *, connections: int, timeout: timedelta, access_log: AccessLog) -> None:
        self._pool = pool
        self._waiting: deque[Waiting] = deque()
        self._loop = asyncio.get_running_loop()
        self._lines = [
            RedisConnection(pool, limit=timeout, when_free=self._take_back, access_log=access_log)
            for _ in range(connections)
        ]
        self._free = list(self._lines)
        self._leaving = False
        self._later: asyncio.TimerHandle | None = None
        self._closed = False

    async def aclose(self) -> None:
        """Give up what is under way, and close the connections."""
        self._closed = True
        if self._later is not None:
            self._later.cancel()
        give_up([answer for _, answer in self._waiting], StoreUnavailable(CLOSED))
        self._waiting.clear()
        await asyncio.gather(*(line.aclose() for line in self._lines))
        await self._pool.aclose()

    async def send(self, *command: Argument, asking: bool = False, urgent: bool = True) -> Any:  # noqa: ANN401 - what Redis answers
        """Send one command and wait for its answer.

        Args:
            *command: The command.
            asking: A node of a cluster has sent us here with it.
            urgent: Without, it waits up to `MAX_BATCH_DELAY` for others to travel with.

        Raises:
            StoreUnavailable: No answer in time; the command may have been carried out.
            StoreFull: Redis is at `maxmemory`; nothing was written.
            StoreRefused: Redis refused the command for another reason.
        """
        if self._closed:
            raise StoreUnavailable(CLOSED)
        if len(self._waiting) >= MAX_WAITING:
            raise StoreUnavailable(f"{MAX_WAITING} commands are waiting for Redis already")
        answer: asyncio.Future[Any] = self._loop.create_future()
        # Packed here: a command that cannot be is its caller's error, not that of a whole batch.
        packed = pack(command)
        if asking:
            self._waiting.append(ask(self._loop))
        self._waiting.append((packed, answer))
        if urgent:
            self._leave_soon()
        elif self._later is None:
            self._later = self._loop.call_later(MAX_BATCH_DELAY, self._leave_at_last)
        try:
            return await answer
        finally:
            # An error that it holds has this frame in its trace, and so all who wait above, with what they hold.
            del answer

    async def send_to_all(self, *command: Argument) -> dict[str, Any]:
        """Send one command to every server there is: to this one. Raises as `send` does."""
        return {"": await self.send(*command)}

    def _leave_soon(self) -> None:
        if self._free and not self._leaving:
            # In the next tick: until then, others' commands join this one.
            self._leaving = True
            self._loop.call_soon(self._leave)

    def _leave_at_last(self) -> None:
        self._later = None
        self._leave()

    def _leave(self) -> None:
        self._leaving = False
        while self._waiting and self._free:
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_BATCH))]
            if batch[-1][0] is ASKING:
                batch.append(self._waiting.popleft())
            self._free.pop().send(batch)

    def _take_back(self, line: RedisConnection) -> None:
        self._free.append(line)
        if not self._closed:
            self._leave()


def ask(loop: asyncio.AbstractEventLoop) -> Waiting:
    """What goes before a command for a slot that is being moved. Nobody waits for its answer."""
    nobody = loop.create_future()
    nobody.cancel()
    return ASKING, nobody


def pack(command: tuple[Argument, ...]) -> bytes:
    """A command as it is sent."""
    try:
        return _packed(command)
    except UnicodeEncodeError:  # lone surrogates; as many marks take their place
        parts = (part.encode("utf-8", "replace") if isinstance(part, str) else part for part in command)
        return _packed(tuple(parts))


def _packed(parts: tuple[Argument, ...]) -> bytes:
    packed: bytes = pack_command(parts)  # type: ignore[arg-type] # its stub knows tuples of one part only
    return packed
