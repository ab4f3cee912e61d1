"""The Redis client: for one server, for Sentinel and for a Redis Cluster."""

import asyncio
import hashlib
from collections.abc import Coroutine, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Self

from redis.exceptions import NoScriptError

from imstream.redis.cluster import Cluster
from imstream.redis.connection import Argument, OnRoundtrip, RedisConnection
from imstream.redis.errors import AccessLog
from imstream.redis.pipeline import MAX_BATCH, Pipeline
from imstream.redis.pools import make_pool
from imstream.urls import RedisUrl, SecretUrl, Topology


def to_dict(fields: Any) -> dict[Any, Any]:  # noqa: ANN401 - what Redis answers
    """The fields of a stream entry or a hash, which Redis returns as field, value, …; with RESP3, a hash as a map."""
    return fields if isinstance(fields, dict) else dict(zip(fields[::2], fields[1::2], strict=True))


def entries_of(answer: Any) -> list[Any]:  # noqa: ANN401 - what Redis answers
    """The entries that XREAD or XREADGROUP returns from one stream, each with its id and fields."""
    streams = answer.items() if isinstance(answer, dict) else answer or ()
    return [entry for _, entries in streams for entry in entries]


class RedisClient:
    """Sends commands in shared pipelines, over at most `connections` to each server. Use as a context manager."""

    def __init__(  # noqa: PLR0913 - one is required, the others are options
        self,
        url: str | SecretUrl,
        *,
        connections: int,
        timeout: timedelta,
        access_log: AccessLog | None = None,
        block: timedelta | None = None,
        on_roundtrip: OnRoundtrip | None = None,
    ) -> None:
        """`block`: how much longer than `timeout` each command may take; then no two share a pipeline."""
        limit, max_batch = (timeout, MAX_BATCH) if block is None else (timeout + block, 1)
        log = access_log or AccessLog()
        connect = partial(RedisConnection, timeout=limit, access_log=log, on_roundtrip=on_roundtrip)
        make_pipeline = partial(Pipeline, connect=connect, connections=connections, max_batch=max_batch)
        parsed = RedisUrl.parse(url)
        self.topology: Topology = parsed.topology
        self.is_split = parsed.topology == "cluster"  # whether keys of different slots cannot be used by one script
        self._servers = (
            Cluster(parsed, make_pipeline, connections=connections, timeout=timeout)
            if parsed.topology == "cluster"
            else make_pipeline(make_pool(parsed, connections=connections, timeout=timeout))
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Fail all commands and close the connections."""
        await self._servers.aclose()

    def execute(self, *command: Argument, urgent: bool = True) -> Coroutine[Any, Any, Any]:
        """Send one command and wait for its reply. In a cluster it goes to the master that has its key.

        Unless it is `urgent` it may wait some milliseconds for others, to share their round trip.

        Raises:
            StoreUnavailable: No reply in time; the command may have been executed.
            StoreFull: Redis is at `maxmemory`; nothing was written.
            StoreRefused: Redis refused the command for another reason.
        """
        return self._servers.send(*command, urgent=urgent)

    async def execute_on_masters(self, *command: Argument) -> dict[str, Any]:
        """Send one command to each master, whatever its key; the replies by address. Raises as `execute` does."""
        masters = await self._servers.masters()
        replies = await asyncio.gather(*(master.send(*command) for master in masters.values()))
        return dict(zip(masters, replies, strict=True))

    async def scan(self, pattern: str) -> set[str]:
        """The keys that match a pattern, on all masters: many short commands that do not block others. As above."""
        found = await asyncio.gather(*(master.scan(pattern) for master in (await self._servers.masters()).values()))
        return set().union(*found)


class BlockingReader(RedisClient):
    """A connection of its own for commands that block, one at a time. Never cancel a blocked `execute`: entries that
    Redis is delivering would stay pending, and `>` never returns them again."""  # noqa: D205, D209 - one thought

    def __init__(
        self, url: str | SecretUrl, *, block: timedelta, timeout: timedelta, access_log: AccessLog | None = None
    ) -> None:
        super().__init__(url, connections=1, timeout=timeout, access_log=access_log, block=block)


class Script:
    """A Lua script, sent by its digest, and as text only to a server that does not have it yet."""

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
