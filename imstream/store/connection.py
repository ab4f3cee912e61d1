"""How commands reach Redis: those of one event-loop tick travel together, over a few connections.

A command of its own round trip costs the client several times what it costs as one of many in a pipeline. So nobody
sends by himself: `Commands.execute` queues, and the first free lane takes all that has gathered.

Nothing is ever repeated here. A time-out means that the outcome is unknown; whoever asked decides (see the scripts:
each may be repeated).
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from typing import TYPE_CHECKING, Any, Self

from hiredis import pack_command
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    ClusterDownError,
    MasterDownError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.maint_notifications import MaintNotificationsConfig

from imstream.errors import StoreFull, StoreRefused, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import timedelta
    from types import TracebackType

    from redis.asyncio.connection import AbstractConnection

MAX_WAITING = 10_000
"""Most commands that wait for a lane. When it is reached Redis is hung, and the next is refused: `StoreUnavailable`."""

MAX_BATCH = 500
"""Most commands that share a pipeline, so that a batch never delays its first answer by much."""

_PASSING = (ReadOnlyError, MasterDownError, ClusterDownError, TryAgainError)
_PASSING_CODES = ("MISCONF", "NOREPLICAS", "BUSY ", "READONLY")
"""Refusals that end by themselves, or when an operator has seen to Redis: as good as not being there."""

_IN_SCRIPT = re.compile(r"Error running script .*?: -(?P<refusal>[A-Z]+ .*)", re.DOTALL)
"""Redis 6.2 puts what it refuses to a script into a sentence of its own."""

_CLOSED = "the connections to Redis are closed"

Argument = str | int | bytes

_Waiting = tuple[bytes, asyncio.Future[Any]]
"""A packed command and where its answer goes."""


def make_pool(url: str, *, connections: int, timeout: timedelta) -> BlockingConnectionPool:
    """A pool that never retries by itself and gives up a connection attempt after `timeout`.

    Every other time limit is the caller's. redis-py's own would send with `asyncio.wait_for`, which costs a task each
    time and, in Python 3.11, forgets that it was cancelled when the sending ends at that moment; and a read that it
    ends would answer None, as if Redis had said that nothing came.
    """
    seconds = timeout.total_seconds()
    return BlockingConnectionPool.from_url(
        url,
        max_connections=connections,
        timeout=seconds,
        socket_timeout=None,
        socket_connect_timeout=seconds,
        # A repeated XADD is a second entry, and a repeated XREADGROUP hides the first one's loss.
        retry=Retry(NoBackoff(), 0),
        decode_responses=True,
        encoding_errors="replace",
        legacy_responses=False,
        # They switch off the check for stale connections, and no server here sends any. (None would mean the default.)
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
        health_check_interval=0,
    )


class Commands:
    """Sends commands to one Redis server in shared pipelines. Use as a context manager; it owns its lanes."""

    def __init__(self, url: str, *, lanes: int, timeout: timedelta) -> None:
        self._pool = make_pool(url, connections=lanes, timeout=timeout)
        self._timeout = timeout.total_seconds()
        self._lanes = lanes
        self._waiting: deque[_Waiting] = deque()
        self._idle: list[asyncio.Future[None]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._loop = asyncio.get_running_loop()
        self._closed = False

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._lane(), name=f"redis-lane-{n}") for n in range(self._lanes)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        _give_up(self._waiting, _CLOSED)
        await self._pool.aclose()

    async def execute(self, *command: Argument) -> Any:  # noqa: ANN401 - what Redis answers
        """Send one command and wait for its answer.

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
        self._waiting.append((_pack(command), answer))
        if self._idle:
            # The lane runs in the next tick: until then, others' commands join this one.
            self._idle.pop().set_result(None)
        return await answer

    async def _lane(self) -> None:
        while True:
            if not self._waiting:
                wake = self._loop.create_future()
                self._idle.append(wake)
                await wake
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_BATCH))]
            if batch:
                await self._round_trip(batch)

    async def _round_trip(self, batch: list[_Waiting]) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                connection = await _connection_of(self._pool)
                try:
                    await connection.send_packed_command([b"".join([packed for packed, _ in batch])])
                    for _, answer in batch:
                        await _settle(connection, answer)
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


class Reader:
    """One connection of its own for commands that block. Never cancel a blocked `execute`: its entries would be lost
    from view (they stay pending, and `>` never returns them again)."""  # noqa: D205, D209 - one thought

    def __init__(self, url: str, *, block: timedelta, timeout: timedelta) -> None:
        self._limit = (block + timeout).total_seconds()
        self._pool = make_pool(url, connections=1, timeout=timeout)

    async def execute(self, *command: Argument) -> Any:  # noqa: ANN401 - what Redis answers
        """Send one command and wait for its answer, up to the blocking time and the time limit together.

        Raises:
            StoreUnavailable: No answer in time.
            StoreRefused: Redis refused the command.
        """
        try:
            async with asyncio.timeout(self._limit):
                connection = await _connection_of(self._pool)
                try:
                    await connection.send_command(*command)
                    return await connection.read_response()
                finally:
                    await self._pool.release(connection)
        except ResponseError as refused:
            raise _explain(refused) from refused
        except (RedisError, TimeoutError, OSError) as lost:
            raise StoreUnavailable(describe(lost)) from lost

    async def aclose(self) -> None:
        """Close the connection."""
        await self._pool.aclose()


async def _connection_of(pool: BlockingConnectionPool) -> AbstractConnection:
    connection: AbstractConnection = await pool.get_connection()  # type: ignore[no-untyped-call] # redis-py's gap
    return connection


async def _settle(connection: AbstractConnection, answer: asyncio.Future[Any]) -> None:
    try:
        # The batch as a whole has a time limit; a timer for each answer would cost more than the answer.
        result = await connection.read_response()
    except ResponseError as refused:
        if not answer.done():
            answer.set_exception(_explain(refused))
    else:
        if not answer.done():
            answer.set_result(result)


def _pack(command: tuple[Argument, ...]) -> bytes:
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


def _explain(refused: ResponseError) -> Exception:
    text = str(refused)
    if in_script := _IN_SCRIPT.match(text):
        text = in_script["refusal"]
    if isinstance(refused, OutOfMemoryError) or text.startswith("OOM "):
        return StoreFull(text)
    if isinstance(refused, _PASSING) or text.startswith(_PASSING_CODES):
        return StoreUnavailable(text)
    return refused if isinstance(refused, NoScriptError) else StoreRefused(text)


def describe(error: BaseException) -> str:
    """One line for an operator; asyncio's TimeoutError has no text of its own."""
    return str(error) or "no answer in time"
