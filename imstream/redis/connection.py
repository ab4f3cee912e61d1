"""One connection to one server: it carries a batch of commands at a time, and gives the answers to who asked.

No task waits for them: they are given in the callback of the transport that reads them, and all that is under way
shares one timer. A task for each connection, redis-py's streams, and a pool that lends the connection each time cost a
node 6 % more CPU under paced answers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, cast

import hiredis
from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection, DefaultParser
from redis.exceptions import InvalidResponse, RedisError, ResponseError

from imstream.errors import StoreDenied, StoreUnavailable
from imstream.redis.errors import AccessLog, Demoted, error_from_loss, error_from_reply
from imstream.redis.pools import connection_of

Waiting = tuple[bytes, asyncio.Future[Any]]
"""A packed command and where its answer goes."""

CLOSED = "the connections to Redis are closed"

_HUNG_UP = "Redis has closed the connection"

_INCOMPLETE = object()


class RedisConnection(asyncio.Protocol):
    """One connection, made by a pool when it is needed. redis-py logs in, encrypts and asks Sentinel.

    Whatever goes wrong ends the connection: answers still on their way must not meet the next batch. `when_free` is
    called after each batch, answered or given up.
    """

    def __init__(
        self,
        pool: ConnectionPool,
        *,
        limit: timedelta,
        when_free: Callable[[RedisConnection], None],
        access_log: AccessLog,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._pool = pool
        self._limit = limit.total_seconds()
        self._when_free = when_free
        self._access_log = access_log
        self._connection: AbstractConnection | None = None
        self._transport: asyncio.Transport | None = None
        """None when there is no connection, or one that is of no use any more."""
        self._opening: asyncio.Task[None] | None = None
        self._answers: deque[asyncio.Future[Any]] = deque()
        self._carrying = False
        self._demoted = False
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def send(self, batch: list[Waiting]) -> None:
        """Send commands and have them answered within the limit, one way or another. Only when the line is free."""
        self._carrying = True
        self._due = self._loop.time() + self._limit
        self._answers.extend([answer for _, answer in batch])
        packed = b"".join([command for command, _ in batch])
        if self._transport is not None:
            self._write(self._transport, packed)
        else:
            self._opening = self._loop.create_task(self._open(packed), name="redis-connect")

    async def aclose(self) -> None:
        """Give up what is under way, and the connection. It may be used again."""
        opening = self._opening
        if opening is not None:
            opening.cancel()
            await asyncio.wait([opening])
        self._break_off(StoreUnavailable(CLOSED))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        self._reader.feed(data)
        try:
            while (answer := self._reader.gets()) is not _INCOMPLETE:
                self._give(answer)
        except RedisError as error:
            self._break_off(error_from_loss(error))
            return
        if self._carrying and not self._answers:
            if self._demoted:
                self._hang_up()  # the next connection is made to whoever is the master then
            self._end()

    def eof_received(self) -> None:
        """Called by the event loop."""
        self._break_off(StoreUnavailable(_HUNG_UP))

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self._streams.connection_lost(exc)
        self._break_off(StoreUnavailable(_HUNG_UP) if exc is None else error_from_loss(exc))

    async def _open(self, packed: bytes) -> None:
        try:
            async with asyncio.timeout_at(self._due):
                transport = self._transport = await self._connect()
        except asyncio.CancelledError:
            self._opening = None
            self._break_off(StoreUnavailable(CLOSED))
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is: who asked is told
            self._opening = None
            self._break_off(error_from_loss(error))
        else:
            self._opening = None
            self._write(transport, packed)

    async def _connect(self) -> asyncio.Transport:
        connection = self._connection
        if connection is None:
            connection = self._connection = await connection_of(self._pool)
        else:
            await connection.disconnect(nowait=True)
            await connection.connect()  # type: ignore[no-untyped-call] # redis-py's gap
        # redis-py has no name for it.
        transport = cast("asyncio.Transport", connection._writer.transport)  # type: ignore[union-attr] # noqa: SLF001
        self._streams = transport.get_protocol()
        self._reader = hiredis.Reader(
            protocolError=InvalidResponse,
            replyError=DefaultParser.parse_error,
            encoding="utf-8",
            errors="replace",
            notEnoughData=_INCOMPLETE,
        )
        self._demoted = False
        transport.set_protocol(self)
        return transport

    def _write(self, transport: asyncio.Transport, packed: bytes) -> None:
        transport.write(packed)
        if self._timer is None:  # else it looks again when it rings
            self._timer = self._loop.call_at(self._due, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._answers and self._opening is None:
            if self._loop.time() >= self._due:
                self._break_off(StoreUnavailable("no answer in time"))
            else:
                self._timer = self._loop.call_at(self._due, self._ring)

    def _give(self, answer: Any) -> None:  # noqa: ANN401 - what Redis answers
        if isinstance(answer, RedisError) and not isinstance(answer, ResponseError):
            raise answer  # no command was carried out: it is loading its data, for instance
        if not self._answers:
            raise InvalidResponse("Redis says what it was not asked")
        error = error_from_reply(answer) if isinstance(answer, ResponseError) else None
        self._demoted = self._demoted or isinstance(error, Demoted)
        if isinstance(error, StoreDenied):
            self._access_log.report(error)
        waiting = self._answers.popleft()
        if waiting.done():
            return  # whoever asked has gone
        if error is None:
            waiting.set_result(answer)
        else:
            waiting.set_exception(error)

    def _hang_up(self) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.set_protocol(self._streams)  # its end is no more that of this line
            transport.close()

    def _break_off(self, why: StoreUnavailable) -> None:
        self._hang_up()
        if isinstance(why, StoreDenied):
            self._access_log.report(why)
        if self._carrying:
            give_up(self._answers, why)
            self._answers.clear()
            self._end()

    def _end(self) -> None:
        self._carrying = False
        self._when_free(self)


def give_up(answers: Iterable[asyncio.Future[Any]], why: StoreUnavailable) -> None:
    """Tell who waits that no answer will come."""
    for answer in answers:
        if not answer.done():
            answer.set_exception(type(why)(*why.args))
