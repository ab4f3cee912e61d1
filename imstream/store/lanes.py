"""How commands reach one server: those of one event-loop tick travel together, over a few connections.

A command of its own round trip costs the client several times what it costs as one of many in a pipeline. So nobody
sends by himself: `Lanes.send` queues, and the first free lane takes all that has gathered.

Nothing is ever repeated here. A time-out means that the outcome is unknown; whoever asked decides (see the scripts:
each may be repeated).
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

from hiredis import pack_command
from redis.exceptions import ResponseError

from imstream.errors import StoreUnavailable
from imstream.store.answers import Demoted, describe, explain
from imstream.store.pools import connection_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import timedelta

    from redis.asyncio import ConnectionPool
    from redis.asyncio.connection import AbstractConnection

MAX_WAITING = 10_000
"""Most commands that wait for a lane. When it is reached Redis is hung, and the next is refused: `StoreUnavailable`."""

MAX_BATCH = 500
"""Most commands that share a pipeline, so that a batch never delays its first answer by much."""

_CLOSED = "the connections to Redis are closed"

ASKING = b"*1\r\n$6\r\nASKING\r\n"
"""Lets the next command of its connection have a key of a slot that is being moved here."""

Argument = str | int | bytes

_Waiting = tuple[bytes, asyncio.Future[Any]]
"""A packed command and where its answer goes."""


class Lanes:
    """Sends commands to one server in shared pipelines. It owns the pool, and a task for each lane."""

    def __init__(self, pool: ConnectionPool, *, lanes: int, timeout: timedelta) -> None:
        self._pool = pool
        self._timeout = timeout.total_seconds()
        self._waiting: deque[_Waiting] = deque()
        self._idle: list[asyncio.Future[None]] = []
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._lanes = lanes
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Open the lanes. They end with `aclose`."""
        self._tasks = [self._loop.create_task(self._lane(), name=f"redis-lane-{n}") for n in range(self._lanes)]

    async def aclose(self) -> None:
        """Give up what is under way, and close the connections."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        _give_up(self._waiting, _CLOSED)
        await self._pool.aclose()

    async def send(self, *command: Argument, asking: bool = False) -> Any:  # noqa: ANN401 - what Redis answers
        """Send one command and wait for its answer. `asking`: a node of a cluster has sent us here with it.

        Raises:
            StoreUnavailable: No answer in time; the command may have been carried out.
            StoreFull: Redis is at `maxmemory`; nothing was written.
            StoreRefused: Redis refused the command for another reason.
        """
        if self._closed:
            raise StoreUnavailable(_CLOSED)
        if len(self._waiting) >= MAX_WAITING:
            raise StoreUnavailable(f"{MAX_WAITING} commands are waiting for Redis already")
        answer: asyncio.Future[Any] = self._loop.create_future()
        # Packed here: a command that cannot be is its caller's error, not that of a whole batch.
        packed = pack(command)
        if asking:
            nobody = self._loop.create_future()
            nobody.cancel()
            self._waiting.append((ASKING, nobody))
        self._waiting.append((packed, answer))
        if self._idle:
            # The lane runs in the next tick: until then, others' commands join this one.
            self._idle.pop().set_result(None)
        return await answer

    async def send_to_all(self, *command: Argument) -> dict[str, Any]:
        """Send one command to every server there is: to this one. Raises as `send` does."""
        return {"": await self.send(*command)}

    async def _lane(self) -> None:
        while True:
            if not self._waiting:
                wake = self._loop.create_future()
                self._idle.append(wake)
                await wake
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_BATCH))]
            if batch and batch[-1][0] is ASKING:
                batch.append(self._waiting.popleft())
            if batch:
                await self._round_trip(batch)

    async def _round_trip(self, batch: list[_Waiting]) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                connection = await connection_of(self._pool)
                try:
                    await connection.send_packed_command([b"".join([packed for packed, _ in batch])])
                    demoted = [await _settle(connection, answer) for _, answer in batch]
                    if any(demoted):
                        # The next one is made to whoever is the master then.
                        await connection.disconnect(nowait=True)
                except BaseException:
                    # Answers still on their way must not meet the next batch.
                    await connection.disconnect(nowait=True)
                    raise
                finally:
                    await self._pool.release(connection)
        except asyncio.CancelledError:
            _give_up(batch, _CLOSED)
            raise
        except Exception as lost:  # noqa: BLE001 - whatever it is: who asked is told, and the lane goes on
            _give_up(batch, describe(lost))


async def _settle(connection: AbstractConnection, answer: asyncio.Future[Any]) -> bool:
    """Pass on the next answer; whether it is that of a server which is no longer the master."""
    try:
        # The batch as a whole has a time limit; a timer for each answer would cost more than the answer.
        result = await connection.read_response()
    except ResponseError as refused:
        error = explain(refused)
        if not answer.done():
            answer.set_exception(error)
        return isinstance(error, Demoted)
    if not answer.done():
        answer.set_result(result)
    return False


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


def _give_up(commands: Iterable[_Waiting], why: str) -> None:
    for _, answer in commands:
        if not answer.done():
            answer.set_exception(StoreUnavailable(why))
