"""One connection to one server: it sends a batch of commands at a time and hands each reply to its caller.

No task waits for replies: they are handed over in the callback of the transport that reads them, and all commands in
flight share one timer. A task per connection, redis-py's streams, and a pool that lends the connection for each batch
cost a node 6 % more CPU under paced answers.

Private names of redis-py are used in this file only: `_writer.transport`, for reading and writing without its streams,
and `DefaultParser.parse_error`, for its classes of errors.
"""

# ruff: noqa: D102 - the callbacks of asyncio.Protocol are described there

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, cast

import hiredis
from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection, DefaultParser
from redis.exceptions import InvalidResponse, RedisError, ResponseError

from imstream.errors import StoreUnavailable
from imstream.redis.errors import AccessLog, Demoted, error_from_loss, error_from_reply

Argument = str | int | bytes

Command = tuple[bytes, asyncio.Future[Any] | None]
"""A packed command and the future of its reply; None when the reply is ignored."""

ASKING: Command = (b"*1\r\n$6\r\nASKING\r\n", None)
"""Lets the next command of a connection use a key of a slot that is being moved to this server."""

CLOSED = "the connections to Redis are closed"
SAMPLE_INTERVAL = 0.1
"""Minimum seconds between two measured round trips of a connection: measuring each would cost 2 % of a batch."""

OnRoundtrip = Callable[[float], None]  # is called with the seconds from the sending of a batch to its last reply

_CLOSED_BY_REDIS = "Redis has closed the connection"

_INCOMPLETE = object()

_DISCARD = struct.pack("ii", 1, 0)
"""Has the system discard what a closed socket has not sent, or was not acknowledged, and reset the connection."""

_pack = cast("Callable[[tuple[Argument, ...]], bytes]", hiredis.pack_command)  # its stub has tuples of one part only


class RedisConnection(asyncio.Protocol):
    """A connection, made when it is first needed. redis-py logs in, encrypts and asks Sentinel.

    Any failure closes it: replies still on their way must not reach the next batch. `on_idle` is called after each
    batch, whether it was answered or failed.
    """

    def __init__(
        self,
        pool: ConnectionPool,
        *,
        timeout: timedelta,
        on_idle: Callable[["RedisConnection"], None],
        access_log: AccessLog,
        on_roundtrip: OnRoundtrip | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._pool = pool
        self._timeout = timeout.total_seconds()
        self._on_idle = on_idle
        self._access_log = access_log
        self._on_roundtrip = on_roundtrip
        self._next_sample = 0.0
        self._connection: AbstractConnection | None = None
        self._transport: asyncio.Transport | None = None  # None while there is no usable connection
        self._opening: asyncio.Task[None] | None = None
        self._replies: deque[asyncio.Future[Any] | None] = deque()
        self._busy = False
        self._demoted = False
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def send(self, batch: list[Command]) -> None:
        """Send commands; each gets a reply or an error within the timeout. Only while the connection is idle."""
        self._busy = True
        self._deadline = self._loop.time() + self._timeout
        self._replies.extend([reply for _, reply in batch])
        packed = b"".join([command for command, _ in batch])
        if self._transport is not None:
            self._write(self._transport, packed)
        else:
            self._opening = self._loop.create_task(self._open(packed), name="redis-connect")

    async def aclose(self) -> None:
        """Fail the commands in flight and close the connection. It may be used again."""
        if (opening := self._opening) is not None:
            opening.cancel()
            await asyncio.wait([opening])
        self._fail(StoreUnavailable(CLOSED))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not _INCOMPLETE:
                self._resolve(reply)
        except RedisError as error:
            self._fail(error_from_loss(error))
            return
        if self._busy and not self._replies:
            if self._demoted:
                self._disconnect()  # the next connection is made to the current master
            if self._on_roundtrip is not None and (now := self._loop.time()) >= self._next_sample:
                self._next_sample = now + SAMPLE_INTERVAL
                self._on_roundtrip(now - self._deadline + self._timeout)
            self._become_idle()

    def eof_received(self) -> None:
        self._fail(StoreUnavailable(_CLOSED_BY_REDIS))

    def connection_lost(self, exc: Exception | None) -> None:
        self._streams.connection_lost(exc)
        self._fail(StoreUnavailable(_CLOSED_BY_REDIS) if exc is None else error_from_loss(exc))

    async def _open(self, packed: bytes) -> None:
        try:
            async with asyncio.timeout_at(self._deadline):
                transport = await self._connect()
        except asyncio.CancelledError:
            self._opening = None
            self._fail(StoreUnavailable(CLOSED))
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the callers are told
            self._opening = None
            self._fail(error_from_loss(error))
        else:
            self._opening = None
            self._write(transport, packed)

    async def _connect(self) -> asyncio.Transport:
        if self._connection is None:
            self._connection = connection = await self._pool.get_connection()  # type: ignore[no-untyped-call] # redis-py's gap
        else:
            connection = self._connection
            await connection.disconnect(nowait=True)
            await connection.connect()  # type: ignore[no-untyped-call] # redis-py's gap
        transport = self._transport = cast("asyncio.Transport", connection._writer.transport)  # noqa: SLF001 - see above
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
        if self._timer is None:  # else it is set again when it fires
            self._timer = self._loop.call_at(self._deadline, self._check_deadline)

    def _check_deadline(self) -> None:
        self._timer = None
        if self._replies and self._opening is None:
            if self._loop.time() >= self._deadline:
                self._fail(StoreUnavailable("no answer in time"))
            else:
                self._timer = self._loop.call_at(self._deadline, self._check_deadline)

    def _resolve(self, reply: Any) -> None:  # noqa: ANN401 - what Redis answers
        if isinstance(reply, RedisError) and not isinstance(reply, ResponseError):
            raise reply  # not about one command: Redis is loading its data, for instance
        if not self._replies:
            raise InvalidResponse("Redis sent a reply without a command")
        error = error_from_reply(reply) if isinstance(reply, ResponseError) else None
        self._demoted = self._demoted or isinstance(error, Demoted)
        if error is not None:
            self._access_log.report(error)
        future = self._replies.popleft()
        if future is None or future.done():
            return  # ignored, or the caller was cancelled
        if error is None:
            future.set_result(reply)
        else:
            future.set_exception(error)

    def _disconnect(self) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.set_protocol(self._streams)  # so that this object is not called when it closes
            # Of commands that are given up, what has not arrived must not be delivered and run later.
            if self._replies and not transport.is_closing():
                transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _DISCARD)
                transport.abort()
            transport.close()

    def _fail(self, error: StoreUnavailable) -> None:
        self._disconnect()
        self._access_log.report(error)
        if self._busy:
            fail_all(self._replies, error)
            self._replies.clear()
            self._become_idle()

    def _become_idle(self) -> None:
        self._busy = False
        self._on_idle(self)


def fail_all(replies: Iterable[asyncio.Future[Any] | None], error: StoreUnavailable) -> None:
    """Raise an error of its own for each caller that still waits."""
    for reply in replies:
        if reply is not None and not reply.done():
            reply.set_exception(type(error)(*error.args))


def pack(command: tuple[Argument, ...]) -> bytes:
    """Encode a command. Lone surrogates become question marks."""
    try:
        return _pack(command)
    except UnicodeEncodeError:
        return _pack(tuple(part.encode("utf-8", "replace") if isinstance(part, str) else part for part in command))
