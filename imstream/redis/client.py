"""The connections to Redis that all of the store uses, wherever Redis is: one server, Sentinel or a Redis Cluster.

`RedisClient` sends what is answered at once, in shared pipelines (see `lanes`); `BlockingReader` sends what blocks.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Coroutine, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from redis.asyncio import ConnectionPool
from redis.exceptions import NoScriptError

from imstream.errors import StoreRefused
from imstream.redis.cluster import Cluster, NodeAddress
from imstream.redis.connection import RedisConnection
from imstream.redis.errors import AccessLog
from imstream.redis.pipeline import Argument, Pipeline, ask, pack
from imstream.redis.pools import make_pool, server_pool
from imstream.urls import RedisUrl, SecretUrl, Topology

__all__ = ["Argument", "BlockingReader", "RedisClient", "Script"]


class RedisClient:
    """Sends commands in shared pipelines, `lanes` at a time to each server. Use as a context manager.

    `denials` says what Redis denies, for all that shares it.
    """

    def __init__(
        self, url: str | SecretUrl, *, connections: int, timeout: timedelta, access_log: AccessLog | None = None
    ) -> None:
        access_log = access_log or AccessLog()
        known = RedisUrl.parse(url)
        self.topology: Topology = known.topology
        self._way: Pipeline | _ClusterLanes = (
            _ClusterLanes(known, connections=connections, timeout=timeout, access_log=access_log)
            if known.topology == "cluster"
            else Pipeline(
                make_pool(known, connections=connections, timeout=timeout),
                connections=connections,
                timeout=timeout,
                access_log=access_log,
            )
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._way.aclose()

    def execute(self, *command: Argument, urgent: bool = True) -> Coroutine[Any, Any, Any]:
        """Send one command and wait for its answer. In a cluster it goes to the master that has its key.

        Without `urgent` it may wait some milliseconds for others to travel with.

        Raises:
            StoreUnavailable: No answer in time; the command may have been carried out.
            StoreFull: Redis is at `maxmemory`; nothing was written.
            StoreRefused: Redis refused the command for another reason.
        """
        return self._way.send(*command, urgent=urgent)

    async def on_every_master(self, *command: Argument) -> dict[str, Any]:
        """Send one command to each master, whatever its key; the answers by address. Raises as `execute` does."""
        return await self._way.send_to_all(*command)


class BlockingReader:
    """One connection of its own for commands that block. Never cancel a blocked `execute`: its entries would be lost
    from view (they stay pending, and `>` never returns them again)."""  # noqa: D205, D209 - one thought

    def __init__(
        self, url: str | SecretUrl, *, block: timedelta, timeout: timedelta, access_log: AccessLog | None = None
    ) -> None:
        access_log = access_log or AccessLog()
        known = RedisUrl.parse(url)
        self._way: _Blocking | _ClusterLines = (
            _ClusterLines(known, block=block, timeout=timeout, access_log=access_log)
            if known.topology == "cluster"
            else _Blocking(
                make_pool(known, connections=1, timeout=timeout), limit=block + timeout, access_log=access_log
            )
        )

    async def execute(self, *command: Argument) -> Any:  # noqa: ANN401 - what Redis answers
        """Send one command and wait for its answer, up to the blocking time and the time limit together.

        Raises:
            StoreUnavailable: No answer in time.
            StoreRefused: Redis refused the command.
        """
        return await self._way.send(*command)

    async def aclose(self) -> None:
        """Close the connection."""
        await self._way.aclose()


class _Blocking:
    """One line to one server, for one command at a time."""

    def __init__(self, pool: ConnectionPool, *, limit: timedelta, access_log: AccessLog) -> None:
        self._pool = pool
        self._line = RedisConnection(pool, limit=limit, when_free=lambda _: None, access_log=access_log)
        self._one_at_a_time = asyncio.Lock()

    async def aclose(self) -> None:
        await self._line.aclose()
        await self._pool.aclose()

    async def send(self, *command: Argument, asking: bool = False) -> Any:  # noqa: ANN401 - what Redis answers
        async with self._one_at_a_time:
            loop = asyncio.get_running_loop()
            answer: asyncio.Future[Any] = loop.create_future()
            batch = [(pack(command), answer)]
            self._line.send([ask(loop), *batch] if asking else batch)
            try:
                return await answer
            except asyncio.CancelledError:
                await self._line.aclose()  # the answer that is still to come is nobody's
                raise
            finally:
                del answer, batch  # see `Pipeline.send`


class _ClusterLanes:
    """Lanes to each master of a cluster."""

    def __init__(self, url: RedisUrl, *, connections: int, timeout: timedelta, access_log: AccessLog) -> None:
        def lanes_to(server: NodeAddress) -> Pipeline:
            pool = server_pool(url, server, connections=connections, timeout=timeout)
            return Pipeline(pool, connections=connections, timeout=timeout, access_log=access_log)

        self._cluster = Cluster(url, timeout=timeout, make_way=lanes_to, access_log=access_log)

    async def aclose(self) -> None:
        await self._cluster.aclose()

    async def send(self, *command: Argument, urgent: bool = True) -> Any:  # noqa: ANN401 - what Redis answers
        return await self._cluster.send(
            command, lambda connections, asking: connections.send(*command, asking=asking, urgent=urgent)
        )

    async def send_to_all(self, *command: Argument) -> dict[str, Any]:
        masters = await self._cluster.masters()
        answers = await asyncio.gather(*(connections.send(*command) for connections in masters.values()))
        return {f"{one.host}:{one.port}": answer for one, answer in zip(masters, answers, strict=True)}


class _ClusterLines:
    """A line to each master of a cluster whose streams are read."""

    def __init__(self, url: RedisUrl, *, block: timedelta, timeout: timedelta, access_log: AccessLog) -> None:
        def line_to(server: NodeAddress) -> _Blocking:
            pool = server_pool(url, server, connections=1, timeout=timeout)
            return _Blocking(pool, limit=block + timeout, access_log=access_log)

        self._cluster = Cluster(url, timeout=timeout, make_way=line_to, access_log=access_log)

    async def aclose(self) -> None:
        await self._cluster.aclose()

    async def send(self, *command: Argument) -> Any:  # noqa: ANN401 - what Redis answers
        try:
            return await self._send(command)
        except StoreRefused as refused:
            if not str(refused).startswith("UNBLOCKED"):
                raise
        # The key went away under a blocked read: it was deleted, or moved to another node. Nothing was delivered, so
        # the command may be sent again, and whoever has the slot now knows.
        return await self._send(command)

    async def _send(self, command: tuple[Argument, ...]) -> Any:  # noqa: ANN401 - what Redis answers
        return await self._cluster.send(command, lambda line, asking: line.send(*command, asking=asking))


class Script:
    """A Lua script, sent by its digest, and as text only to a server that does not know it yet."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    async def run(
        self, redis: RedisClient, keys: Sequence[str], arguments: Sequence[Argument], *, urgent: bool = True
    ) -> Any:  # noqa: ANN401 - what Redis answers
        """Run the script. Takes `urgent` and raises as `RedisClient.execute` does."""
        try:
            return await redis.execute("EVALSHA", self.digest, len(keys), *keys, *arguments, urgent=urgent)
        except NoScriptError:  # a new or restarted server: nothing was executed, so the text may follow
            return await redis.execute("EVAL", self.text, len(keys), *keys, *arguments)
